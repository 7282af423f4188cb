"""The kinds of work there are. Importing it fills the table that the worker goes by."""

from adapters import answers, comparison, exports, merges, pushes, work

work.KINDS |= {
    merges.KIND: merges.do_merge,
    exports.KIND: exports.do_gguf,
    pushes.KIND: pushes.do_push,
    answers.KIND: answers.do_answers,
    comparison.KIND: comparison.do_compare,
}
