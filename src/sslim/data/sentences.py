"""Sentences for synthetic speech: a small template grammar over about five hundred common words, driven by a generator.

The words were chosen so that every English consonant and vowel comes often, in easy and in hard neighbourhoods. Sentences are
grammatical and make little sense, which keeps their words nearly independent of each other.
"""

from __future__ import annotations

import re

import numpy as np

_LISTS = {
    "adjective": """old young tall short quiet noisy clever foolish gentle angry hungry thirsty busy lazy happy gloomy
        brave shy proud humble rich poor strong weak quick slow warm cold dry wet clean dirty heavy light broad narrow
        smooth rough sharp blunt sweet sour bitter fresh dusty shiny pale dark bright golden silver wooden rusty broken
        empty full hollow round square curved strange famous ordinary enormous tiny curious careful cheerful generous
        patient nervous serious""",
    "colour": "red blue green yellow orange purple brown black white grey pink",
    "person": """farmer teacher doctor nurse baker butcher sailor soldier pilot painter singer dancer writer lawyer
        judge king queen prince child boy girl mother father uncle aunt brother sister cousin neighbour stranger thief guard
        chef waiter student professor engineer carpenter gardener fisherman shepherd postman driver tailor jeweller""",
    "name": """George Alice Thomas Mary John Sophie Peter Ruth Charles Joan Philip Vera Hugh Zoe Jacob Laura Victor
        Judith Nathan Beth Oscar Rachel Boyd Joyce Sean Faith""",
    "animal": """dog cat horse cow sheep goat pig mouse rat fox wolf bear lion tiger monkey rabbit squirrel bird crow
        hawk owl goose duck swan frog toad snake turtle fish shark whale beetle spider butterfly donkey badger""",
    "thing": """bottle basket box bag cup plate spoon knife fork kettle pot lamp candle mirror chair table bench shelf
        drawer curtain carpet blanket pillow coat hat shirt shoe boot glove scarf ring watch clock key lock rope chain
        hammer saw nail shovel bucket ladder wheel engine boat ship train bridge tower fence gate door window roof wall
        picture book letter paper pencil map coin jewel treasure vase drum flute violin trumpet guitar camera telephone
        umbrella bicycle wagon parcel package toy joint""",
    "food": """bread butter cheese milk honey sugar salt pepper soup rice beef chicken bacon carrot onion potato tomato
        cabbage bean apple pear peach plum cherry grape lemon melon berry cake biscuit chocolate coffee tea juice porridge
        sausage mushroom""",
    "place": """river lake ocean beach harbour island mountain valley forest meadow field garden orchard village city
        market church castle palace school library hospital station airport factory museum theatre kitchen cellar attic
        stable barn shop office desert canyon cave road street corner square park farm cottage lighthouse""",
    "time": """yesterday today tonight tomorrow this:morning this:evening last:Thursday last:August before:noon
        after:lunch in:January in:July every:Friday at:midnight on:Wednesday long:ago at:dawn once:again""",
    "did": """found lost bought sold carried dropped painted measured washed hid stole borrowed returned watched admired
        noticed chose pushed pulled lifted threw caught kept fixed broke opened closed wrapped shared weighed examined
        described drew photographed remembered forgot wanted loved hated missed guarded brought fetched touched polished
        exchanged enjoyed destroyed""",
    "can": """find lose buy sell carry drop paint measure wash hide steal borrow return watch admire notice choose push
        pull lift throw catch keep fix break open close wrap share weigh examine describe draw remember forget guard bring
        fetch touch polish exchange enjoy destroy join choose teach reach judge""",
    "went": """walked ran jumped slept danced sang laughed cried shouted whispered waited stood sat fell climbed swam
        vanished arrived travelled worked played rested coughed sneezed smiled yawned paused hurried wandered listened
        rejoiced charged marched""",
    "manner": """quietly loudly slowly quickly gently roughly carefully foolishly bravely calmly suddenly happily sadly
        rarely often always never usually hardly gladly nearly together alone without:a:sound with:great:pleasure
        all:day:long""",
    "where": """near beside behind above below under over inside outside across:from in:front:of close:to beyond
        through:the:fog:of""",
    "number": """two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty
        sixty ninety a:hundred a:thousand zero:or:one""",
    "joint": "and but so because while before after although unless until whenever",
    "modal": "will could should would might must shall can",
    "question": "why where when how",
    "subject": "he she they we you I",
    "object": "him her them us you me",
}
WORDS = {kind: tuple(word.replace(":", " ") for word in words.split()) for kind, words in _LISTS.items()}
"""Words of each kind; some entries are short fixed phrases."""

_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "wolf": "wolves", "knife": "knives",
    "shelf": "shelves", "scarf": "scarves",
}  # fmt: skip

_WHO = (
    "the {person}", "the {adjective} {person}", "{name}", "{name} and {name}", "our {adjective} {person}", "the {animal}",
    "a {adjective} {animal}", "my {person}", "their {person}",
)  # fmt: skip
_WHAT = (
    "the {thing}", "a {colour} {thing}", "the {adjective} {thing}", "that {adjective} {colour} {thing}",
    "the {person}'s {thing}", "some {adjective} {food}", "the {food} and the {food}",
    "{number} {animals} of the {place}", "these {things}", "{object}", "{number} pounds of {food}",
    "each {thing}", "your {thing}",
)  # fmt: skip
_CLAUSES = (
    "{WHO} {did} {WHAT}",
    "{WHO} {did} {WHAT} {where} the {place}",
    "{WHO} {went} {manner}",
    "{WHO} {went} {where} the {adjective} {place}",
    "{subject} {modal} {can} {WHAT}",
    "{subject} {modal} {manner} {can} {WHAT}",
    "there were {number} {colour} {things} {where} the {place}",
    "{WHO} was {adjective} and {adjective}",
)
_SENTENCES = (
    *("{CLAUSE}",) * 4,
    "{CLAUSE} {time}",
    "{time}, {CLAUSE}",
    "{CLAUSE}, {joint} {CLAUSE}",
    "{question} did {WHO} {can} {WHAT}",
    "do not {can} {WHAT}, {name}",
    "thank you, {name}, {CLAUSE}",
    "{number}, {number}, {number} and {number}",
)


def _plural(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


_OPTIONS = {
    "WHO": _WHO,
    "WHAT": _WHAT,
    "CLAUSE": _CLAUSES,
    "animals": tuple(_plural(noun) for noun in WORDS["animal"]),
    "things": tuple(_plural(noun) for noun in WORDS["thing"]),
    **WORDS,
}


def draw_sentence(generator: np.random.Generator) -> str:
    """Returns one sentence with its commas and a full stop, without capital letters except in names."""

    def choose(options: tuple[str, ...]) -> str:
        return options[int(generator.integers(len(options)))]

    text = choose(_SENTENCES)
    while (begin := text.find("{")) >= 0:  # the first slot is filled until none is left: templates nest
        end = text.index("}", begin)
        kind = text[begin + 1 : end]
        text = text[:begin] + choose(_OPTIONS[kind]) + text[end + 1 :]
    return re.sub(r"\ba (?=[aeiou])", "an ", text) + "."


def transcript(sentence: str) -> str:
    """Returns the words only, in lower case: what a recogniser should write."""
    return " ".join("".join(c for c in sentence.lower() if c.isalpha() or c in " '").split())
