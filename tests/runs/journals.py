"""Events as the engine writes them to its journal."""


def step_event(n, loss=1.0, **more):
    return {
        "kind": "step",
        "step": n,
        "loss": loss,
        "learning_rate": 0.1,
        "gradient_norm": 1.0,
        "tokens": 10,
        "trained_tokens": 5,
        "total_tokens": 10 * n,
        "tokens_per_second": 100.0,
        "seconds": 0.1,
        "memory_bytes": 1000 + n,
        "memory_peak_bytes": 2000 + n,
        **more,
    }


class Journal:
    """Numbers events as the engine does."""

    def __init__(self):
        self.seq = 0

    def lines(self, *events):
        numbered = []
        for event in events:
            self.seq += 1
            numbered.append({"seq": self.seq, "time": 1000.0 + self.seq, **event})
        return numbered
