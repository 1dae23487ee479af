"""Filters of traces, each of which keeps a trace or names the reason for dropping it."""
