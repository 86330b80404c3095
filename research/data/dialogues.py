"""Questions and answers about images: what a source of them is, and the files that people have.

LLaVA's format: a JSON list (or JSON lines) of

    {"id": ..., "image": "folder/a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                           {"from": "gpt", "value": "A cat."}, ...]}

`image` may be a list, or absent in dialogues without one. COCO captions, VQAv2 and TextVQA are distributed in it.
Dialogues about videos have `video` in its place, or beside it; the mark in their questions is `<video>`, or `<image>`
where all that an entry has is videos. Those about sounds have `audio` in its place, and the mark `<audio>`.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, Protocol

from research.errors import UserError
from research.paths import expand

HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """images: as arrays uint8[h, w, 3], of videos uint8[F, h, w, 3], of sounds f32[N], or paths of files; turns:
    ((question, answer), ...), in which `<image>` stands where an image or a video is, `<audio>` where a sound is."""

    images: tuple[Any, ...]
    turns: tuple[tuple[str, str], ...]


class DialogueSource(Protocol):
    """Numbered dialogues: a small frozen value that stands in a config. Whatever it reads is read at first use."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Dialogue: ...


@dataclasses.dataclass(frozen=True)
class LlavaFiles:
    """Dialogues in LLaVA's format.

    Args:
        path: a .json or .jsonl file.
        images: the folder that paths of images are below; that of the file by default.
    """

    path: str
    images: str | None = None

    def __len__(self) -> int:
        return len(_entries(self.path))

    def __getitem__(self, number: int) -> Dialogue:
        """Raises UserError, naming the entry, for one that is not of the format."""
        where, entry = f"{self.path}, entry {number}", _entries(self.path)[number]
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise UserError(f"{where}: an object with a list `conversations` is expected")
        images, videos, sounds = (_files(entry, kind, where) for kind in ("image", "video", "audio"))
        if sounds and (images or videos):
            raise UserError(f"{where}: a sound beside images or videos, which no model here reads together")
        folder = expand(self.images if self.images is not None else Path(self.path).parent)
        turns, said = [], None
        for number_, turn in enumerate(entry["conversations"]):
            speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
            wanted = HUMAN if said is None else MODEL
            if speaker not in wanted or not isinstance(value, str):
                raise UserError(f"{where}: turn {number_} is not a text from {wanted[0]}")
            if said is None:
                said = value
            else:
                turns.append((said, value))
                said = None
        if said is not None or not turns:
            raise UserError(f"{where}: the last question has no answer")
        asked = "".join(question for question, _ in turns)
        counted = "<image>|<audio>" if sounds else "<image>|<video>" if videos else "<image>"
        marks = re.findall(counted, asked)
        if videos:
            marks = marks if images else ["<video>"] * len(marks)
            turns = [(question.replace("<video>", "<image>"), answer) for question, answer in turns]
        for mark, files in (("<image>", images), ("<video>", videos), ("<audio>", sounds)):
            if marks.count(mark) != len(files):
                raise UserError(
                    f"{where}: {marks.count(mark)} {mark} in the questions, but {len(files)} {mark[1:-1]}s"
                )
        left = {"<image>": iter(images), "<video>": iter(videos), "<audio>": iter(sounds)}
        return Dialogue(tuple(str(folder / next(left[mark])) for mark in marks), tuple(turns))


def _files(entry: dict[str, Any], kind: str, where: str) -> list[str]:
    """The paths that an entry has of a kind."""
    names = entry.get(kind, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: `{kind}` is a path or a list of paths")
    return names


@functools.lru_cache(maxsize=4)
def _entries(path: str) -> list[Any]:
    file = expand(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: a list of dialogues is expected")
    return entries
