"""What a run prints inside an epoch: a bar where there is tqdm and a terminal, else a line now and then."""

import time
from collections.abc import Callable

BAR_SECONDS, LINE_SECONDS = 0.5, 30.0


class Progress:
    """Of one epoch of so many samples, `done` of which an earlier run has trained on. A context manager."""

    def __init__(self, epoch: int, epochs: int, samples: int, done: int, *, silent: bool) -> None:
        self.label, self.samples, self.done, self.silent = f"epoch {epoch}/{epochs}", samples, done, silent
        self.start, self.first = time.perf_counter(), done
        self.shown, self.bar = self.start, None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        if not silent:
            bar = tqdm(desc=self.label, total=samples, initial=done, unit=" samples", leave=False, disable=None)
            self.bar = None if bar.disable else bar  # disable=None: no bar where the output is no terminal

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, samples: int, means: Callable[[], tuple[float, float]]) -> None:
        """After each step. means() gives loss and accuracy; it is called only to show them, because a GPU waits."""
        self.done += samples
        now = time.perf_counter()
        if self.silent or now - self.shown < (LINE_SECONDS if self.bar is None else BAR_SECONDS):
            return
        self.shown = now
        loss, accuracy = means()
        text = f"loss {loss:.4f}, accuracy {100 * accuracy:.1f} %"
        if self.bar is None:
            rate = (self.done - self.first) / (now - self.start)
            print(f"{self.label}: {self.done} of {self.samples} samples, {text}, {rate:.0f} samples/s", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self.done - self.bar.n)
