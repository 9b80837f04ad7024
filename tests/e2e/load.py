"""Requests that go on while pools change under them."""

import threading
import time

import openai


class Load:
    """Requests of a few clients, each one after the other, until the `with` block ends."""

    def __init__(self, ask, *, pause_s, threads=3):
        self._ask, self._pause_s = ask, pause_s
        self._stop = threading.Event()
        self.answers, self.failures = [], []
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more):
        """Until so many more answers have come, or a failure."""
        answered = len(self.answers)
        while len(self.answers) < answered + more and not self.failures:
            time.sleep(0.1)

    def _run(self):
        while not self._stop.wait(self._pause_s):
            try:
                self.answers.append(self._ask())
            except openai.OpenAIError as error:
                self.failures.append(error)
