"""The kinds of work there are. Importing it fills the table that the worker goes by."""

from adapters import merges, work

work.KINDS |= {merges.KIND: merges.do_merge}
