"""A small grammar of sentences that read like captions of pictures.

Only words and rules: no picture, caption file or data set was looked at, and none is read.
"""

from __future__ import annotations

import random

_COLOURS = """
red blue green yellow orange purple pink brown black white grey silver golden turquoise beige
crimson pale-blue dark-green violet cream
""".split()
_SIZES = "small large tiny big huge little tall narrow wide long short".split()
_LOOKS = """
old young wooden striped spotted shiny dusty broken empty round square furry smooth rusty bright
faded wet sleepy colourful plain modern ancient fluffy painted metal glass stone plastic knitted
leather curved folded ripe fresh frozen tangled
""".split()
_PEOPLE = """man,woman,boy,girl,child,baby,farmer,fisherman,chef,teacher,cyclist,runner,skier,surfer
,musician,soldier,firefighter,nurse,dancer,tourist,couple,family,crowd,painter,mechanic
,sailor,player,climber,group of children,group of people,team of workers,bride and groom
,old man,young woman,street musician,mother and child""".replace("\n", "").split(",")
_ANIMALS = """
dog cat horse cow sheep goat pig rabbit squirrel fox wolf bear deer elephant giraffe zebra lion
tiger leopard monkey gorilla camel kangaroo penguin owl eagle hawk parrot duck goose swan
chicken rooster pigeon sparrow crow hummingbird seagull flamingo turtle frog toad lizard snake
crocodile whale dolphin seal shark salmon goldfish crab lobster octopus jellyfish butterfly moth
bee wasp ant beetle ladybird spider dragonfly snail hedgehog mouse hamster donkey llama panda
koala puppy kitten lamb foal
""".split()
_THINGS = """
car bus truck van bicycle motorcycle train tram boat ship canoe aeroplane helicopter balloon
tractor table chair sofa bed desk lamp clock mirror vase bowl plate cup mug bottle glass jar
kettle teapot spoon fork knife pan basket box suitcase backpack umbrella hat scarf coat shirt
shoe boot glove guitar piano violin drum trumpet flute book newspaper pencil brush camera
telephone computer keyboard television radio key lock candle rope ladder hammer saw bucket
shovel kite ball doll balloon puzzle statue fountain bench flag lantern sign tent barrel wheel
anchor bell crown ring apple pear banana orange lemon strawberry cherry grape melon pineapple
tomato carrot onion pumpkin mushroom cake pie loaf sandwich pizza cheese egg cupcake cookie
flower rose tulip sunflower daisy tree oak palm cactus leaf feather shell rock
""".split()
_PLACES = """in a field|on the beach|in the snow|at the edge of a forest|beside a river|on a busy street
|in front of a brick wall|next to a window|on a wooden table|under a tree|in a garden
|on a mountain|near a lake|in the kitchen|in a dark room|on the grass|by the sea|on a bridge
|at a railway station|in the desert|against a blue sky|on a white background
|in a shop window|at sunset|in the rain|on a rooftop|in the harbour|in an empty room
|on a shelf|at the market|in the park|on the floor|behind a fence|on the roof of a house
|at night|in a museum|on a cobbled street|in the fog""".replace("\n", "").split("|")
_ACTS = """standing|sitting|sleeping|running|walking|jumping|looking at the camera|eating|drinking
|playing|resting|waiting|swimming|climbing|lying down|hiding|turning around""".replace("\n", "").split("|")
_DOES = """riding a {t}|holding a {t}|carrying a {t}|looking at a {t}|painting a {t}
|standing next to a {t}|sitting on a {t}|pushing a {t}|pointing at a {t}|buying a {t}
|repairing a {t}|reaching for a {t}""".replace("\n", "").split("|")
_SHAPES = """
circle square triangle star cross ring diamond rectangle hexagon heart oval arrow line dot
crescent cube sphere pyramid
""".split()
_RELATIONS = """left of|right of|above|below|next to|inside|behind|in front of|on top of|under|between two
|far from|touching|overlapping|to the left of|to the right of""".replace("\n", "").split("|")
_FRAMES = """a photo of |a photograph of |a picture of |a drawing of |a close-up of |a painting of 
|a sketch of|an old photograph of |a black and white photo of |a view of |an image showing 
|there is |in the picture we see """.replace("\n", "").split("|")
_COUNTS = "two three four five several many a-pair-of a-row-of a-pile-of".split()


def caption(rng: random.Random) -> str:
    """One sentence such as could stand under a picture."""
    body = rng.choices((_scene, _person, _still, _shapes, _many, _parts), weights=(4, 4, 3, 3, 2, 2))[0](
        rng
    )
    if rng.random() < 0.15:
        body = rng.choice(_FRAMES) + body
    if rng.random() < 0.6:
        body = body[0].upper() + body[1:]
    return body + rng.choice((".", ".", ""))


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _noun(rng: random.Random, nouns: list[str]) -> str:
    """A noun with no, one or two adjectives, in English order: size, look, colour."""
    adjectives = [
        rng.choice(pool)
        for pool, share in ((_SIZES, 0.25), (_LOOKS, 0.25), (_COLOURS, 0.4))
        if rng.random() < share
    ]
    return _with_article(" ".join([*adjectives, rng.choice(nouns)]).replace("-", " "))


def _place(rng: random.Random) -> str:
    return " " + rng.choice(_PLACES) if rng.random() < 0.7 else ""


def _scene(rng: random.Random) -> str:
    is_ = rng.choice((" is", "", ""))
    return f"{_noun(rng, _ANIMALS)}{is_} {rng.choice(_ACTS)}{_place(rng)}"


def _person(rng: random.Random) -> str:
    does = rng.choice(_DOES).replace("a {t}", _noun(rng, _THINGS + _ANIMALS))
    return f"{_with_article(rng.choice(_PEOPLE))} {does}{_place(rng)}"


def _still(rng: random.Random) -> str:
    first = _noun(rng, _THINGS)
    if rng.random() < 0.5:
        first += f" {rng.choice(_RELATIONS[:10])} {_noun(rng, _THINGS)}"
    return first + _place(rng)


def _shapes(rng: random.Random) -> str:
    relation = rng.choice(_RELATIONS)
    other = _noun(rng, _SHAPES)
    if relation == "between two":
        other = f"{rng.choice(_COLOURS)} {rng.choice(_SHAPES)}s".replace("-", " ")
    ground = rng.choice(("", "", f" on {_with_article(rng.choice(_COLOURS))} background"))
    return f"{_noun(rng, _SHAPES)} {relation} {other}{ground}".replace("-", " ")


def _many(rng: random.Random) -> str:
    noun = rng.choice([n for n in _THINGS + _ANIMALS if n[-1] not in "hsfyx"])
    count = rng.choice(_COUNTS).replace("-", " ")
    colour = rng.choice(_COLOURS).replace("-", " ") + " " if rng.random() < 0.5 else ""
    return f"{count} {colour}{noun}s{_place(rng)}"


def _parts(rng: random.Random) -> str:
    part = rng.choice("head tail eyes wings roof door wheels leaves handle legs ears edge".split())
    colour = rng.choice(_COLOURS).replace("-", " ")
    noun = _noun(rng, _ANIMALS + _THINGS)
    whole = rng.choice((f"{noun} with {colour} {part}", f"the {colour} {part} of {noun}"))
    return whole + _place(rng)
