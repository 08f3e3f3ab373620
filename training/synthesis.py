"""Child-like synthetic speech for the demonstration: espeak-ng's voices with pitch and formants raised.

Children's vocal tracts are shorter than adults', which moves pitch and formants up together; playing speech that was
spoken slowly at a higher rate does the same. Speech like this is no substitute for recordings of children: it shows the
whole path from audio to an adapted model where no recordings are at hand.
"""

import ctypes
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from .audio import SAMPLE_RATE
from .errors import UserError
from .output import write_rows

# Asynchronous retrieval (1) hangs in espeak_Synchronize once the library is initialised a second time.
_SYNCHRONOUS_RETRIEVAL = 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_CHARACTERS, _UTF8 = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Child:
    """A synthetic speaker: espeak-ng voice, words a minute, pitch and range (0 to 99), how far all is raised."""

    name: str
    voice: str
    words_per_minute: int
    pitch: int
    pitch_range: int
    raised: float
    age: int


# Voices of one list are not in the other: the test hears children the training did not.
TRAINING_CHILDREN = (
    Child("anna", "en-us+f2", 135, 55, 60, 1.38, 6),
    Child("ben", "en-us+m3", 140, 60, 50, 1.48, 7),
    Child("clara", "en+f4", 130, 50, 65, 1.34, 8),
    Child("david", "en+m7", 145, 65, 45, 1.45, 9),
    Child("emma", "en-us+f5", 125, 60, 55, 1.30, 10),
    Child("finn", "en-gb-scotland+m1", 140, 60, 50, 1.50, 7),
    Child("grace", "en-gb-x-rp+f1", 130, 52, 60, 1.36, 8),
    Child("henry", "en-us+m5", 135, 62, 55, 1.46, 6),
)
TEST_CHILDREN = (
    Child("iris", "en-us+f3", 132, 56, 58, 1.37, 7),
    Child("jack", "en+m4", 138, 62, 52, 1.47, 8),
    Child("kate", "en-gb-scotland+f2", 128, 54, 60, 1.33, 9),
    Child("liam", "en-us+m6", 142, 60, 50, 1.44, 6),
)

_PEOPLE = (
    "my mother",
    "our teacher",
    "the old farmer",
    "my little brother",
    "his aunt",
    "the doctor",
    "her best friend",
)
_ANIMALS = ("dog", "rabbit", "brown horse", "kitten", "yellow duck", "small turtle", "giraffe", "parrot", "squirrel")
_THINGS = ("red ball", "wooden box", "paper kite", "blue umbrella", "birthday cake", "story book", "pair of shoes")
_PLACES = ("in the garden", "near the river", "behind the school", "at the zoo", "under the bridge", "on the beach")
_TIMES = ("yesterday", "this morning", "after lunch", "last summer", "every Sunday", "before dinner")
TRAINING_PATTERNS = (
    "{person} found a {thing} {place}",
    "I saw a {animal} sleeping {place}",
    "we gave the {animal} some water {time}",
    "can you bring {person} the {thing}",
    "{time} {person} played with the {animal}",
    "the {animal} ran away with a {thing}",
    "please put the {thing} {place}",
    "{person} told us a story about a {animal}",
    "there was a {thing} hidden {place} {time}",
    "why is the {animal} hiding {place}",
)


# The test reads other sentences, not only other words in the same ones.
TEST_PATTERNS = (
    "look, a {animal} is eating {place}",
    "{person} wants to buy a {thing} for the {animal}",
    "did you see {person} {place} {time}",
    "my friend painted a {thing} and a {animal}",
    "{time} it rained and the {animal} got wet",
    "who left a {thing} {place}",
)


def sentences(count: int, seed: int, patterns: Sequence[str]) -> list[str]:
    """`count` different sentences a child might read, made from `patterns`, the same for the same seed."""
    rng = random.Random(seed)
    words = {"person": _PEOPLE, "animal": _ANIMALS, "thing": _THINGS, "place": _PLACES, "time": _TIMES}
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        sentence = rng.choice(patterns).format(**{name: rng.choice(options) for name, options in words.items()})
        question = sentence.startswith(("can ", "why ", "did ", "who "))
        chosen[sentence[:1].upper() + sentence[1:] + ("?" if question else ".")] = None
    return list(chosen)


class Synthesizer:
    """espeak-ng's library, as the wheel `espeakng-loader` carries it.

    Raises:
        UserError: the wheel is not installed, or the library refuses a voice.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            raise UserError('synthetic speech needs espeak-ng: pip install "fused-s2lora[demo]"') from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._library.espeak_Initialize(_SYNCHRONOUS_RETRIEVAL, 0, data, 0)
        if self.sample_rate <= 0:
            raise UserError(f"espeak-ng does not start with its data in {data.decode()}; reinstall espeakng-loader")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # else seeded with the time of day
        self._samples: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library holds no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, child: Child, rng: np.random.Generator) -> np.ndarray:
        """`text` in the child's voice: float32 samples [n] at 16 kHz, with a little noise and silence around it."""
        if self._library.espeak_SetVoiceByName(child.voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {child.voice!r}; reinstall espeakng-loader")
        for parameter, value in ((_RATE, child.words_per_minute), (_PITCH, child.pitch), (_RANGE, child.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._samples = []
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(encoded, len(encoded), 0, _CHARACTERS, 0, _UTF8, None, None)
        adult = np.concatenate(self._samples).astype(np.float32) / 32768
        # Samples spoken at one rate and taken for a higher one: shorter, and every frequency raised.
        raised = soxr.resample(adult, self.sample_rate * child.raised * rng.uniform(0.97, 1.03), SAMPLE_RATE)
        silence = np.zeros(round(0.25 * SAMPLE_RATE), np.float32)
        speech = np.concatenate([silence, 0.7 * raised / max(1e-3, float(np.abs(raised).max())), silence])
        noise = rng.normal(scale=10 ** (-rng.uniform(30, 40) / 20) * speech.std(), size=speech.shape)
        return (speech + noise).astype(np.float32)


def write_speech(folder: Path, texts: Sequence[str], children: Sequence[Child], seed: int) -> None:
    """Writes each text, spoken by the children in turn, as FLAC with a metadata.csv (an `audiofolder`).

    Raises:
        UserError: espeak-ng is not to be had, or the folder cannot be written.
    """
    synthesizer = Synthesizer()
    rng = np.random.default_rng(seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[tuple] = [("file_name", "text", "speaker", "age")]
        for index, text in enumerate(texts):
            child = children[index % len(children)]
            name = f"{child.name}-{index:04d}.flac"
            soundfile.write(folder / name, synthesizer.speak(text, child, rng), SAMPLE_RATE)
            rows.append((name, text, child.name, child.age))
        write_rows(folder / "metadata.csv", rows)  # last, so that its presence says that all audio is there
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); give another --output") from error
