"""What templates, tokenizers and processors raise at one sample, as that sample's error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vig.data.sample import SampleError
from vig.models.answer_spans import PromptError


@contextmanager
def as_sample_errors(key: str, id: str) -> Iterator[None]:
    """Raises SampleError for whatever is raised at one sample.

    Not of a sample, and raised as they are: the processor as a whole, the machine.
    """
    try:
        yield
    except (SampleError, PromptError, ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # they raise what they like
        reason = f"it cannot be prepared ({type(error).__name__}: {error})"
        raise SampleError(key, id, reason, "Check its turns and images") from error
