"""The training program: a run folder in, events and files out. It knows no Django, no database and
no web.

`config`, `events`, `outcome` and `files` import no torch, so the site may read them.
"""
