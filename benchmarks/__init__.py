"""Measurements that print their figures; with --json as one JSON object on the last line."""
