"""What a training run shows on the console: a progress bar on a terminal, a line for each evaluation elsewhere."""

import shutil
import sys
import time

from tqdm import tqdm

from experiment.metrics import METRIC_TITLES, SHOWN_METRICS


class TrainingProgress:
    """The progress of a training run from the step `first` to the step `last`."""

    def __init__(self, first, last):
        self.first, self.last, self.started = first, last, time.monotonic()
        width = shutil.get_terminal_size().columns  # 80 where the terminal says 0, for which tqdm shows nothing
        self.bar = tqdm(
            desc="training", total=last, initial=max(first - 1, 0), unit=" steps", disable=None, ncols=width
        )
        self.close = self.bar.close

    def advance(self, step):
        """Shows that `step` has begun."""
        self.bar.update(step > 0)
        if step == self.last:
            self.close()  # the final evaluation has a bar of its own

    def show(self, step, loss, metrics):
        """Shows the metrics of an evaluation on test images, and the training loss since the one before."""
        shown = [f"{METRIC_TITLES[name]} {metrics[name]:.1%}" for name in SHOWN_METRICS if name in metrics]
        self.bar.set_postfix_str(f"test {', '.join(shown)}", refresh=False)
        if not sys.stdout.isatty() and step > 0:
            left = (time.monotonic() - self.started) / (step - self.first + 1) * (self.last - step)
            tqdm.write(f"step {step:,}: loss {loss:.3f}, test {', '.join(shown)}, {left:.0f} s left")
            sys.stdout.flush()
