"""The kinds of work there are. Importing it fills the table that the worker goes by."""

from adapters import jobs
from adapters.evaluation import replies, weight_analysis
from adapters.export import gguf, hub, merge

jobs.KINDS |= {
    merge.KIND: merge.do_merge,
    gguf.KIND: gguf.do_gguf,
    hub.KIND: hub.do_push,
    replies.KIND: replies.do_answers,
    weight_analysis.KIND: weight_analysis.do_compare,
}
