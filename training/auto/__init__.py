"""Auto LLM: from model, data, device and what a person locked, to the settings of a run with a
reason for each.
"""
