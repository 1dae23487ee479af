"""From a dataset row to scored samples: tasks, templates, engines, Ray placement, weight sync and the stream of groups."""
