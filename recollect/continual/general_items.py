"""Forty questions of arithmetic, common sense and reading with four answers each, one of them right.

Written for this package; each position holds the right answer ten times.  See `recollect.continual.general_ability`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Skill = Literal["arithmetic", "common sense", "reading"]


@dataclass(frozen=True)
class GeneralItem:
    """One question. correct: position of the right option. passage: text it is about, "" for none."""

    skill: Skill
    question: str
    options: tuple[str, str, str, str]
    correct: int
    passage: str = ""


def _sum(question: str, options: tuple[str, str, str, str], correct: int) -> GeneralItem:
    return GeneralItem("arithmetic", question, options, correct)


def _everyday(question: str, options: tuple[str, str, str, str], correct: int) -> GeneralItem:
    return GeneralItem("common sense", question, options, correct)


def _text(passage: str, question: str, options: tuple[str, str, str, str], correct: int) -> GeneralItem:
    return GeneralItem("reading", question, options, correct, passage)


_FERRY = (
    "The ferry to the island leaves at eight in the morning and at five in the afternoon. On Sundays only the later "
    "one runs, because the captain plays the organ in church. A ticket costs four coins; children travel free."
)
_GARDEN = (
    "Marta planted beans along the fence and pumpkins by the well. The slugs ate the beans within a week, but the "
    "pumpkins grew so large that her neighbour Oskar lent her his cart to bring them to the market."
)
_LIBRARY = (
    "The town library moved from the old mill to the former station last spring. The reading room now faces the "
    "tracks, which nobody uses any more. Mr. Lindqvist, who ran the library for thirty years, retired before the "
    "move, and his niece took over."
)
_OVEN = (
    "Our oven has a fault: the lower plate heats, the upper one does not. We therefore bake bread as usual, turn each "
    "loaf over after half an hour, and have given up on gratins altogether until the technician comes on Thursday."
)

GENERAL_ITEMS: tuple[GeneralItem, ...] = (
    _sum("What is 17 plus 26?", ("43", "33", "44", "53"), 0),
    _sum("What is 90 minus 34?", ("66", "56", "54", "64"), 1),
    _sum("What is 8 times 7?", ("54", "48", "56", "64"), 2),
    _sum("What is 72 divided by 9?", ("7", "9", "6", "8"), 3),
    _sum("A crate holds 12 bottles. How many bottles are in 5 crates?", ("60", "50", "65", "17"), 0),
    _sum("Ines had 31 stamps and gave 14 to her brother. How many has she left?", ("27", "17", "45", "16"), 1),
    _sum(
        "A film begins at 7 o'clock and lasts 150 minutes. When does it end?",
        ("at 9", "at 10", "at half past 9", "at 8"),
        2,
    ),
    _sum("Three friends share a bill of 48 coins equally. What does each pay?", ("12", "18", "15", "16"), 3),
    _sum("A rope of 20 metres is cut into pieces of 4 metres. How many pieces are there?", ("5", "4", "6", "16"), 0),
    _sum("Which number is half of 86?", ("42", "43", "46", "48"), 1),
    _sum("A bus with 22 passengers lets 9 off and takes 5 on. How many are aboard?", ("26", "8", "18", "36"), 2),
    _sum("How many days are there in 6 weeks?", ("36", "48", "60", "42"), 3),
    _sum("A shirt of 40 coins is sold a quarter cheaper. What does it cost?", ("30", "36", "10", "35"), 0),
    _sum("Which of these numbers is the largest?", ("0.7", "0.71", "0.09", "0.65"), 1),
    _everyday("What do you need to post a letter?", ("a ladder", "a spoon", "a stamp", "a bell"), 2),
    _everyday(
        "Why does a cook wear an oven glove?",
        ("to look taller at work", "to stay awake longer", "to smell the food", "to protect the hand"),
        3,
    ),
    _everyday("What happens to an ice cube on a sunny table?", ("It melts.", "It burns.", "It grows.", "It rings."), 0),
    _everyday(
        "Where would you look for a book to borrow?", ("in a bakery", "in a library", "in a garage", "in a stable"), 1
    ),
    _everyday("Which of these would sink in a pond?", ("a cork", "a feather", "a stone", "a dry leaf"), 2),
    _everyday(
        "What does a person who yawns again and again probably want?", ("to run", "to sing", "to argue", "to sleep"), 3
    ),
    _everyday("Which tool drives a nail into a board?", ("a hammer", "a comb", "a kettle", "a pillow"), 0),
    _everyday(
        "The street is wet everywhere this morning. What happened most likely?",
        ("The sun rose.", "It rained.", "A dog barked.", "Shops opened."),
        1,
    ),
    _everyday(
        "What should you do before you cross a busy road?",
        ("close your eyes", "sit down", "look both ways", "count backwards"),
        2,
    ),
    _everyday(
        "Which of these can a blind person read?", ("a painted sign", "a neon light", "a wall clock", "raised dots"), 3
    ),
    _everyday("Why are winter coats lined?", ("to keep warm", "to float", "to shine", "to make noise"), 0),
    _everyday("What do you use to see in a dark cellar?", ("a rake", "a torch", "a broom", "a whistle"), 1),
    _everyday(
        "Someone whispers in a room with a sleeping baby. Why?",
        ("to be heard outside", "to keep warm", "not to wake it", "to save time"),
        2,
    ),
    _text(_FERRY, "How many ferries leave on a Sunday?", ("three", "two", "none", "one"), 3),
    _text(
        _FERRY,
        "What does a family of two adults and two children pay?",
        ("eight coins", "four coins", "twelve coins", "sixteen coins"),
        0,
    ),
    _text(
        _FERRY,
        "Why does the morning ferry not run on Sundays?",
        ("The sea is rough.", "The captain is in church.", "Nobody travels.", "All the tickets are sold out."),
        1,
    ),
    _text(
        _GARDEN,
        "What became of the beans?",
        ("They were sold.", "They were given to Oskar.", "Slugs ate them.", "They dried up."),
        2,
    ),
    _text(_GARDEN, "What did Oskar lend Marta?", ("a fence", "a well", "a pumpkin", "a cart"), 3),
    _text(
        _GARDEN, "Where did the pumpkins grow?", ("by the well", "along the fence", "at the market", "in the cart"), 0
    ),
    _text(
        _LIBRARY,
        "Where is the library now?",
        ("in the old mill", "in the former station", "in a wooden church", "in a school"),
        1,
    ),
    _text(
        _LIBRARY,
        "Who runs the library today?",
        ("Mr. Lindqvist", "the mayor", "Mr. Lindqvist's niece", "the master of the station"),
        2,
    ),
    _text(
        _LIBRARY,
        "What can be said of the tracks?",
        ("They are new.", "They are busy.", "They were all taken away.", "They are out of use."),
        3,
    ),
    _text(
        _OVEN, "Which part of the oven is broken?", ("the upper plate", "the lower plate", "the door", "the lamp"), 0
    ),
    _text(
        _OVEN,
        "Why are the loaves turned over?",
        (
            "They would burn on the lower side.",
            "They get heat from below only.",
            "They rise better so.",
            "They cool faster so.",
        ),
        1,
    ),
    _text(_OVEN, "What is not cooked for the time being?", ("bread", "loaves", "gratins", "anything"), 2),
    _text(_OVEN, "Who is expected on Thursday?", ("a guest", "a baker", "a neighbour", "a technician"), 3),
)
