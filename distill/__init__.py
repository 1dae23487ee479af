"""Supervised training on worked text: base models from random weights, students from traces."""
