"""The errors that users meet; the command line turns these alone into one line, any other is a bug of ours."""

import signal


class InputError(ValueError):
    """Bad input: the message names the setting or file, what was expected and what came. Exit code 2."""


class WrongFingerprint(InputError):
    """A carrier or trigger belongs to another base, tokenizer or chat template."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (a loss that stays NaN, say); the message says what to change. Exit code 1."""


class CheckpointFailed(TrainingStopped):
    """A checkpoint could not be written; earlier ones are untouched."""


class RankLost(TrainingStopped):
    """Another rank ended without a word (killed, say), or does not answer any more."""


class ToldByAnotherRank(TrainingStopped):
    """A run of several ranks ended by `error` here, and another rank says why: one message is enough."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(f"another rank says why ({error})")


class StopRequest:
    """What a signal leaves behind: its number in `signal`, 0 while none has come."""

    signal = 0


class Terminated(TrainingStopped):
    """The process was asked to end by `signal`; a checkpoint of the last step was written. Exit code 128 + signal."""

    def __init__(self, request: StopRequest, *, step: int, last: str) -> None:
        self.signal = request.signal or signal.SIGTERM  # another rank's signal stops this one too
        super().__init__(f"terminated after step {step}; {last}; go on with --resume")
