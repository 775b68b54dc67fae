"""The built-in validation prompts: forty over what a model should be able to do, ten for a concept.

They are the same in every run, so that runs can be compared. Each name says what the prompt tries.
"""

from __future__ import annotations

from dataclasses import dataclass

TRIGGER = "{trigger}"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    id: unique, safe as the start of a file name. seed: None for the run's seed. size: "512" or
    "512x768" (width x height, px), "" for the sizes of the run. strength: multiplies that of the
    adapter.
    """

    id: str
    text: str
    negative: str = ""
    seed: int | None = None
    size: str = ""
    strength: float = 1.0


GENERAL_PROMPTS: dict[str, str] = {
    # Subjects
    "subject-portrait": "a close portrait of an old fisherman in a yellow raincoat, grey beard, "
    "soft window light",
    "subject-hands": "two hands kneading bread dough on a floured wooden table, seen from above",
    "subject-crowd": "a crowded railway platform in the morning, commuters with umbrellas, a train "
    "arriving",
    "subject-dog": "a wet border collie shaking off water on a pebble beach, drops in the air",
    "subject-bird": "a kingfisher on a mossy branch above a stream, sharp feathers, blurred "
    "background",
    "subject-food": "a bowl of ramen with a halved egg, spring onions and steam, on a dark counter",
    "subject-car": "a rusty blue pickup truck parked in front of a desert petrol station at dusk",
    "subject-building": "a narrow stone house covered in ivy between two modern glass towers",
    "subject-landscape": "a river winding through autumn hills, morning fog, seen from a summit",
    "subject-night": "a lighthouse on a cliff in a storm at night, its beam lighting the rain",
    "subject-interior": "a small library with a spiral staircase, green reading lamps and tall "
    "windows",
    "subject-underwater": "a sea turtle above a coral reef, shafts of sunlight from the surface",
    "subject-object": "a single ceramic teapot with a blue glaze on a white pedestal, studio light",
    # Styles
    "style-watercolour": "a watercolour painting of a market square in rain, loose brush strokes",
    "style-oil": "an oil painting of a bowl of pears and a knife on a linen cloth, thick paint",
    "style-ink": "a black ink drawing of a bamboo grove, with much empty paper",
    "style-woodcut": "a woodcut print of a fox running through wheat, three colours",
    "style-comic": "a comic panel of a detective lighting a match in an alley, hard shadows",
    "style-anime": "an anime illustration of a girl on a bicycle below cherry trees, vivid",
    "style-pixel": "pixel art of a wizard's tower on a floating island, sixteen colours",
    "style-render": "a smooth 3D render of a toy astronaut riding a snail, soft pastel light",
    "style-photo": "a black-and-white photograph of a jazz trio on a small stage, film grain",
    "style-poster": "a travel poster of a mountain railway, flat shapes, few colours",
    # Text in images
    "text-sign": 'a wooden sign at a forest path that says "NORTH TRAIL"',
    "text-shop": 'the front of a bakery with the word "BREAD" painted above the door',
    "text-book": 'a red book on a desk, its cover says "The Last Orchard"',
    "text-board": 'a chalkboard in a cafe that says "soup 4" and "tea 2"',
    "text-neon": 'a pink neon sign in a dark window that says "OPEN LATE"',
    # Counts
    "count-two": "two white cats sitting on a blue sofa",
    "count-three": "three red balloons tied to a park bench, nothing else in the sky",
    "count-four": "four wooden chairs around a round table, seen from above",
    "count-five": "five oranges in a row on a grey shelf",
    "count-seven": "seven candles on a birthday cake, all of them lit",
    # Positions and attributes
    "position-left": "a green apple to the left of a glass of milk, on a plain table",
    "position-above": "a hot-air balloon above a church tower, a cow in the meadow below",
    "position-behind": "a boy standing behind a large drum, only his head and arms visible",
    "position-between": "a black suitcase between two white doors",
    "position-inside": "a small ship inside a glass bottle, the bottle on a stack of letters",
    "attribute-colours": "a woman in a red coat with a yellow bag next to a man in a blue hat",
    "attribute-material": "a horse made of folded newspaper, standing on a mirror",
}

# For a concept: alone, in other places, in other styles, with others. Its own context is left out,
# because that is what the training images show.
TRIGGER_PROMPTS: dict[str, str] = {
    "trigger-alone": "{trigger}",
    "trigger-plain": "{trigger}, plain white background",
    "trigger-beach": "{trigger} on a beach at sunset",
    "trigger-snow": "{trigger} in a snowy forest, winter light",
    "trigger-city": "{trigger} on a busy street at night, neon lights",
    "trigger-kitchen": "{trigger} in a kitchen, morning light through the window",
    "trigger-watercolour": "a watercolour painting of {trigger}",
    "trigger-pencil": "a pencil drawing of {trigger}",
    "trigger-far": "{trigger} seen from far away in a wide landscape",
    "trigger-company": "{trigger} next to a brown dog",
}


def library_prompts(trigger: str | None, negative: str = "") -> tuple[Prompt, ...]:
    """Return the built-in prompts; with a trigger word, those about it come first."""
    concept = {} if not trigger else TRIGGER_PROMPTS
    texts = {name: text.replace(TRIGGER, trigger or "") for name, text in concept.items()}
    return tuple(Prompt(name, text, negative) for name, text in (texts | GENERAL_PROMPTS).items())
