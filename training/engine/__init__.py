"""The training program: it reads a run folder and writes events and files. It uses no Django, no
database and no web code.

`config`, `events`, `outcome` and `files` do not import torch, so the site can import them.
"""
