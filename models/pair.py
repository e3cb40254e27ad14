"""Two networks side by side in one flat dictionary of weights, told apart by the prefixes of their names.

MoCo's, DenseCL's and HCSC's files hold a query and a key encoder, MoCo v3's a base and a momentum encoder, BYOL's an online
and a target network: what is called student and teacher here. Facts: facebookresearch/moco, moco-v3 (builder.py),
reference/densecl-hcsc.md 1.6 and 2.10; BYOL's own file is a pickle of another framework, so the prefixes are those of
its public rewrites. Their authors evaluate the student, unlike those of Mugs, DINO and iBOT.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .layouts import place

Who = Literal["student", "teacher"]
WHO: tuple[Who, Who] = ("student", "teacher")
OUTER = re.compile(r"(?:(?:_orig_mod|module|model|learner)\.)+")


@dataclass(frozen=True)
class Family:
    """How one code base tells its two networks apart, and the objective to which its head belongs."""

    student: str  # pattern of the prefix, dot included
    teacher: str
    objective: str | None  # None: the file does not say which method it is


FAMILIES = (
    Family(r"encoder_q\.", r"encoder_k\.(?:module\.)?", "instance"),
    Family(r"base_encoder\.", r"momentum_encoder\.", "batch_contrast"),
    Family(r"online_(?:encoder|network|net|backbone)\.", r"target_(?:encoder|network|net|backbone)\.", "bootstrap"),
    Family(r"backbone\.", r"momentum_(?=(?:backbone|projector)\.)", None),  # solo-learn
)


@dataclass(frozen=True)
class Pair:
    """A family, as one file has it."""

    family: Family
    objective: str | None
    held: tuple[Who, ...]
    copies: bool  # whether `backbone.` repeats the student's backbone (DenseCL), instead of being it

    def place(self, key: str, who: Who) -> tuple[str, str | None]:
        """(group, our name) of a name, for the network asked for; what is the other's is in the group "other network"."""
        bare = _bare(key)
        if match := re.match(self.family.teacher, bare):
            side, rest = "teacher", bare[match.end() :]
        elif match := re.match(self.family.student, bare):
            side, rest = "student", bare[match.end() :]
        elif bare.startswith("backbone."):
            side, rest = ("copies" if self.copies else "student"), bare.removeprefix("backbone.")
        elif match := re.fullmatch(r"queue\d?(?:_ptr|(_index))?", bare):
            return ("bookkeeping" if match[1] else "queues"), None
        else:
            side, rest = "student", bare  # a predictor, or a head beside the backbone
        if side == "copies":
            return side, None
        if side != who:
            return "other network", None
        # A Sequential of backbone and head numbers them; MoCo v1's head is one layer where v2's is a list of them.
        rest = re.sub(r"^fc\.(weight|bias)$", r"fc.0.\1", re.sub(r"^0\.", "", rest))
        group, name = place(rest, self.objective or "unknown")
        return group, None if name and name.startswith("heads.unknown.") else name

    def queues(self, keys: Iterable[str]) -> dict[str, str]:
        """Our names of the queues among these names, "instance.queue" and "dense.queue", and theirs."""
        ours = {"queue": f"{self.objective}.queue", "queue2": "dense.queue"}
        return {ours[bare]: key for key in keys if (bare := _bare(key)) in ours}


def pair_of(keys: Iterable[str]) -> Pair | None:
    """The two networks that these names are of, or None where they are of one. One of the two may be absent."""
    names = [_bare(key) for key in keys]
    for family in FAMILIES:
        student = any(re.match(family.student, name) for name in names)
        teacher = any(re.match(family.teacher, name) for name in names)
        if not teacher and not (student and family.objective):
            continue
        plain = any(name.startswith("backbone.") for name in names)
        held: tuple[Who, ...] = tuple(who for who in WHO if (teacher if who == "teacher" else student or plain))
        # HCSC is MoCo v2 with a buffer more, and the head is that of all its levels.
        hierarchy = family.objective == "instance" and "queue_index" in names
        return Pair(family, "hierarchy" if hierarchy else family.objective, held, copies=student)
    return None


def _bare(key: str) -> str:
    match = OUTER.match(key)
    return key[match.end() :] if match else key
