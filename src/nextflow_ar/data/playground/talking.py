"""Tasks of conversation: chats in which pictures are drawn, asked about and changed, and words alone with now and
then a turn that asks for a picture, so that beginning an image is a choice.
"""

from __future__ import annotations

from collections.abc import Callable

from nextflow_ar.data.playground.asking import question_about
from nextflow_ar.data.playground.canvases import Canvas
from nextflow_ar.data.playground.editing import edited, instruction
from nextflow_ar.data.playground.episodes import Answer, Draft, Episode, Part, Truth, draws, shows, tells
from nextflow_ar.data.playground.knowledge import CLUES, COLOUR_CLUES
from nextflow_ar.data.playground.maker import Reject
from nextflow_ar.data.playground.reading import number_words
from nextflow_ar.data.playground.saying import asked_to_draw, grounded, phrase, polite, things_asked
from nextflow_ar.data.playground.words import article
from nextflow_ar.data.playground.world import GROUP_OF, GROUPS, MANY, SPRITES, UNCOUNTED

_SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello", "hi", "hi there", "good morning", "hey"), "hello! what shall i draw or look at?"),
    (("how are you?", "how do you do?", "are you well?"), "i am well, thank you. and you?"),
    (("who are you?", "what are you?", "what is your name?"), "i am a model that reads and draws pictures."),
    (("what can you do?", "what are you good at?", "help"), "i can draw, describe, change and explain pictures."),
    (("thank you", "thanks", "thanks a lot", "thank you so much"), "you are welcome!"),
    (("that looks nice", "very good", "well done", "i like it", "great"), "i am glad that you like it."),
    (("bye", "good bye", "see you", "that is all"), "good bye!"),
    (("do you like to draw?", "is drawing fun?"), "yes, and i like to be asked about pictures too."),
    (("i am bored", "what shall we do?"), "shall i draw something, or ask you a riddle?"),
    (
        ("which colours do you know?", "name your colours"),
        "red, orange, yellow, green, blue, purple, black, white, pink and brown.",
    ),
    (("which shapes do you know?", "name some shapes"), "circles, squares, triangles, crosses and rings."),
    (("are you a person?", "are you human?"), "no, i am a program."),
    (("good night", "i am going to bed"), "good night, sleep well!"),
    (("ok", "fine", "all right"), "what shall we do next?"),
)  # fmt: skip

Exchange = tuple[str, Answer]


def _arithmetic(draft: Draft) -> Exchange:
    rng = draft.rng
    sign = rng.choice(("plus", "minus", "times"))
    if sign == "times":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        result = a * b
    else:
        a, b = rng.randint(0, 49), rng.randint(0, 49)
        a, b = (max(a, b), min(a, b)) if sign == "minus" else (a, b)
        result = a + b if sign == "plus" else a - b
    digits = rng.random() < 0.6
    left, right = (str(a), str(b)) if digits else (number_words(a), number_words(b))
    symbol = {"plus": "+", "minus": "-", "times": "*"}[sign] if digits and rng.random() < 0.5 else sign
    form = rng.choice(
        (
            "what is {} {} {}?",
            "how much is {} {} {}?",
            "{} {} {}?",
            "work out {} {} {}",
            "can you tell me {} {} {}?",
        )
    )
    return form.format(left, symbol, right), Answer(str(result) if digits else number_words(result), "number")


def _things_left(draft: Draft) -> Exchange:
    rng = draft.rng
    name = rng.choice([n.name for n in SPRITES if n.name not in UNCOUNTED])
    a, b = rng.randint(2, 9), rng.randint(1, 5)
    if rng.random() < 0.5:
        text = f"i have {number_words(a)} {MANY[name]} and get {number_words(b)} more. how many do i have?"
        return text, Answer(number_words(a + b), "number")
    b = min(a, b)
    gone = rng.choice(("give away", "lose", "sell"))
    text = f"there are {number_words(a)} {MANY[name]} and i {gone} {number_words(b)}. how many are left?"
    return text, Answer(number_words(a - b), "number")


def _knowledge(draft: Draft) -> Exchange:
    rng = draft.rng
    if rng.random() < 0.25:
        colour = rng.choice(tuple(COLOUR_CLUES))
        clue = rng.choice([clue for clue in COLOUR_CLUES[colour] if clue.startswith("the colour")])
        return f"what is {clue}?", Answer(colour, "colour")
    name = rng.choice(tuple(CLUES))
    clue = rng.choice(CLUES[name])
    if rng.random() < 0.25:
        form = rng.choice(("what do you know about {a}?", "tell me something about {a}", "what is {a}?"))
        return form.format(a=phrase((name, None))), Answer(clue, "free")
    form = rng.choice(("{clue}: what is it?", "guess: {clue}", "do you know {clue}?", "{clue}?"))
    return form.format(clue=clue), Answer(phrase((name, None)), "name")


def _membership(draft: Draft) -> Exchange:
    rng = draft.rng
    called = {
        "animal": "an animal",
        "food": "food",
        "plant": "a plant",
        "vehicle": "a vehicle",
        "shape": "a shape",
    }
    group, yes = rng.choice(tuple(called)), rng.random() < 0.5
    others = [name for g in called if g != group for name in GROUPS[g] if {g, group} != {"food", "plant"}]
    name = rng.choice(GROUPS[group] if yes else others)
    answer = "yes" if GROUP_OF[name] == group else "no"
    a = name if name in UNCOUNTED else article(name)
    verb = "are" if name == "grapes" else "is"
    return f"{verb} {a} {called[group]}?", Answer(answer, "yes_no")


def _imagined(draft: Draft) -> Exchange:
    rng = draft.rng
    first, second = rng.sample([n.name for n in SPRITES if n.name not in UNCOUNTED], 2)
    relation, back = rng.choice(
        (("left of", "right of"), ("above", "below"), ("right of", "left of"), ("below", "above"))
    )
    text = f"imagine {article(first)} {relation} {article(second)}. what is {back} the {first}?"
    return text, Answer(article(second), "name")


def _small_talk(draft: Draft) -> Exchange:
    ways, reply = draft.rng.choice(_SMALL_TALK)
    return draft.rng.choice(ways), Answer(reply, "free")


_PLAIN: tuple[Callable[[Draft], Exchange], ...] = (
    _arithmetic, _arithmetic, _things_left, _knowledge, _knowledge, _membership, _imagined, _small_talk, _small_talk,
)  # fmt: skip


def _in_words(draft: Draft) -> tuple[list[Part], Answer]:
    question, answer = draft.rng.choice(_PLAIN)(draft)
    return [draft.person(question), tells(answer.text)], answer


def _drawn(draft: Draft) -> tuple[list[Part], Canvas]:
    rng = draft.rng
    if rng.random() < 0.5:
        task, canvas = draft.maker.scene(plain=True)
        words, asked = things_asked(rng, canvas, bare=task == "single_object")
    else:
        canvas = draft.maker.party(1, 3)
        words, asked = things_asked(rng, canvas)
    if rng.random() < 0.75:
        words = grounded(rng, canvas, words)
    return [draft.person(asked_to_draw(rng, words)), draws(asked)], canvas


def plain(draft: Draft) -> Episode:
    """One to three turns in words; in every third episode one of them asks for a picture, and only that one gets one."""
    turns = 1 + draft.index // 3 % 3
    picture = draft.rng.randrange(turns) if draft.index % 3 == 0 else -1
    parts: list[Part] = []
    answers: list[Answer] = []
    for turn in range(turns):
        if turn == picture:
            parts += _drawn(draft)[0]
            continue
        said, answer = _in_words(draft)
        parts += said
        answers.append(answer)
    return Episode("", tuple(parts), Truth("picture" if picture >= 0 else "words", tuple(answers)))


_CHAT_EDITS = ("add", "remove", "replace", "colour", "size", "move", "background", "rotate")


def chat(draft: Draft) -> Episode:
    """Three to six turns: something is drawn (or shown), then asked about, changed, and talked over. At most three
    pictures.
    """
    rng, maker = draft.rng, draft.maker
    turns = 3 + draft.index % 4
    answers: list[Answer] = []
    if rng.random() < 0.75:
        parts, canvas = _drawn(draft)
        pictures = 1
    else:
        canvas, pictures = maker.party(1, 3), 1
        question, answer = question_about(draft, canvas)
        parts = [shows(canvas), question, tells(answer.text)]
        answers.append(answer)
    plot = ["ask", "edit", *(rng.choice(("ask", "edit", "edit", "talk", "talk")) for _ in range(turns - 3))]
    rng.shuffle(plot)
    for turn in plot:
        if turn == "edit" and pictures < 3:
            edit, after = _some_edit(draft, canvas)
            parts += [draft.person(polite(rng, instruction(rng, edit, canvas))), draws(after)]
            canvas, pictures = after, pictures + 1
        elif turn == "ask":
            question, answer = question_about(draft, canvas)
            parts += [question, tells(answer.text)]
            answers.append(answer)
        else:
            said, answer = _in_words(draft)
            parts += said
            answers.append(answer)
    return Episode("", tuple(parts), Truth("chat", tuple(answers)))


def _some_edit(draft: Draft, canvas: Canvas):
    for _ in range(20):
        try:
            return edited(draft.maker, draft.pick(_CHAT_EDITS), canvas)
        except Reject:
            continue
    raise Reject
