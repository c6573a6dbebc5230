"""`steer_own`: does a latent that means a colour in text change the colour that is said of an object?

The latent is chosen in text alone: among training captions, read without an image, the one whose activation
best tells a colour word's tokens from other colour words' (AUROC; among equals the largest difference of
means). Its mean activation there is the level. In scenes whose objects have boxes one object of each image,
and a target colour that no object of the scene has, are drawn by the image's name. At one layer, on the
tokens of the object's patches, the latent of the object's own colour is set to 0 and the target's raised by
its level: x + decode(changed latents) - decode(latents), so that what the SAE does not explain stays. In
nats, read on the image's own caption, steered less clean:

    steer_own         log p(target) - log p(own colour) where the caption says the object's colour
    steer_third       the same of a third colour, likewise not in the scene, in the target's place
    steer_target      log p(target) - log p(third colour): steer_own - steer_third
    steer_other       log p(target) - log p(their own colour) at the other objects' colours
    steer_background  steer_own with the same vectors added to as many background patches
    steer_random      steer_own with vectors as long, of another latent in each image, on the object's
    steer_gap         log p(own colour) - log p(target) before: what steer_own needs to change the word

So image positions mean by this latent what text means as far as `steer_target` is above 0 and `steer_own`
above the last three. `steer_third` is what whatever blurs the own colour brings any other: the likely
word has only one way to go.

A long token drowns a change of text's size, and image tokens of early layers are several times as long as
words: `relative` raises it in proportion to the token's length. Off by default: three forwards for
each layer. Attention sinks stay where they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber.data.scenes import COLOURS
from lightning_limber.probe.attributes import centred_ranks
from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.metrics.neighbours import MAX_TEXTS, read_places, spread, word_places
from lightning_limber.probe.metrics.object_patches import (
    check_places,
    choose_object,
    knows_boxes,
    patch_centres,
)
from lightning_limber.probe.metrics.use import by_image
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.token_stats import sum_by_image

if TYPE_CHECKING:
    from lightning_limber.data.collate import Batch
    from lightning_limber.data.prompt import Prompt
    from lightning_limber.models.limber import Limber
    from lightning_limber.probe.intervention import Intervention
    from lightning_limber.probe.passes import Probe

METRICS = (
    *("steer_own", "steer_third", "steer_target", "steer_background", "steer_random", "steer_other"),
    "steer_gap",
)


class ColourLatents(NamedTuple):
    """The latents that mean C colours in text, at one layer.

    Attributes:
        latents: [C] which.
        levels: [C] mean activation on the colour's tokens.
        auroc: [C] float64, on the tokens that chose them.
        length: Mean length of colour words' tokens.
    """

    latents: Tensor
    levels: Tensor
    auroc: Tensor
    length: Tensor


def choose_latents(activations: Tensor, colours: Tensor, length: Tensor) -> ColourLatents:
    """Chooses for each colour the latent that best tells its tokens from the other colours'.

    Args:
        activations: [T, K] of T tokens of colour words.
        colours: [T] number of each token's colour, every number from 0 to C - 1 among them; on the host.
        length: Mean length of the tokens.
    """
    has = torch.nn.functional.one_hot(colours).T.to(activations)  # [C, T]
    count = has.sum(-1, keepdim=True)
    pairs = count * (len(colours) - count)
    # (AUROC - 1/2) x pairs: equal AUROCs are equal numbers.
    margins = has @ centred_ranks(activations.T).T  # [C, K]
    mean = has @ activations / count
    difference = mean - (1 - has) @ activations / (len(colours) - count)
    best = margins == margins.amax(-1, keepdim=True)
    latents = torch.where(best, difference, -torch.inf).argmax(-1)  # [C]

    def of_latents(table: Tensor) -> Tensor:
        return table.gather(1, latents[:, None])[:, 0]

    auroc = 0.5 + of_latents(margins / pairs).double()
    return ColourLatents(latents, of_latents(mean), auroc, length)


def changed_label(
    prompt: Prompt, caption: str, scene: dict[str, Any], number: int, colour: str
) -> tuple[int, int, int] | None:
    """Where a caption becomes another when an object's colour does.

    Args:
        prompt: Makes labels of the caption.
        caption: Says the scene's objects in their order.
        scene: Its truth.
        number: Of the object.
        colour: In the place of its own.

    Returns:
        Number of the first label that differs, and its two token ids, of the caption and of the new one;
        None where the caption is cut before, or one begins as the other ends.
    """
    start = end = 0
    for item in scene["objects"][: number + 1]:
        start = caption.index(f"{item['colour']} {item['shape']}", end)
        end = start + len(item["colour"])
    texts = [prompt.text(text) for text in (caption, caption[:start] + colour + caption[end:])]
    old, new = (
        [token for token, is_it in zip(text.ids, text.is_target, strict=True) if is_it] for text in texts
    )
    for label, pair in enumerate(zip(old, new, strict=False)):
        if pair[0] != pair[1]:
            return label, *pair
    return None


class Steering(NamedTuple):
    """Which tokens of a batch are steered to what, and what is read: m tokens, q colour words.

    Attributes:
        cells: [m] image tokens of the objects' patches.
        background: [m] as many of the background, of the same images.
        own: [m] number of the object's colour.
        target: [m] number of the colour that it shall be.
        chance: [m] number from 0 to 1 that draws another latent, one for each image.
        labels: [q] number of the label that says a colour.
        tokens: [q, 3] token ids of its colour, of the target and of the third colour.
        is_own: [q] 1 where it is the steered object's, 0 another's.
    """

    cells: Tensor
    background: Tensor
    own: Tensor
    target: Tensor
    chance: Tensor
    labels: Tensor
    tokens: Tensor
    is_own: Tensor


def plan_steering(batch: Batch, model: Limber, tokens: int, colours: Sequence[str]) -> Steering | None:
    """Draws object and colours of each image by the image's name.

    Args:
        batch: Scenes with one caption each.
        model: Its token grid is known.
        tokens: Number of image tokens of the batch that are counted.
        colours: Those that have a latent.

    Returns:
        None where no image has an object to steer.
    """
    grid, prompt = model.token_grid, model.collator().prompt
    assert grid is not None  # `ObjectSteer.setup`
    per_image = tokens // len(batch.index)
    before = per_image - grid[0] * grid[1]  # Tokens before the grid's; -1: its first is never counted.
    steered: list[tuple[int, int, int, int, float]] = []
    read: list[tuple[int, tuple[int, int, int], bool]] = []
    first_label = 0
    for image, (scene, [caption]) in enumerate(zip(batch.scenes, batch.captions, strict=True)):
        assert scene is not None  # `knows_boxes`
        labels_before, first_label = first_label, first_label + batch.label_counts[image]
        centres = patch_centres(model.vision.transform, scene["image_size"], grid)
        rng = random.Random(batch.image_ids[image])
        found = choose_object(scene, centres, max(0, -before), rng)
        free = sorted(set(colours) - {item["colour"] for item in scene["objects"]})
        rng.shuffle(free)
        if found is None or scene["objects"][found[0]]["colour"] not in colours:
            continue
        number, swaps = found
        changes = {colour: changed_label(prompt, caption, scene, number, colour) for colour in free}
        # Two colours that part from the object's, and from each other, at one label.
        drawn = next(
            (
                (target, one, third)
                for target, one in changes.items()
                for third in changes.values()
                if one and third and one[:2] == third[:2] and one[2] != third[2]
            ),
            None,
        )
        if drawn is None:
            continue
        target, (label, own, new), third = drawn
        read.append((labels_before + label, (own, new, third[2]), True))
        others = [i for i in range(len(scene["objects"])) if i != number]
        for changed in (changed_label(prompt, caption, scene, i, target) for i in others):
            if changed is not None:
                # No third colour is read there.
                read.append((labels_before + changed[0], (*changed[1:], changed[2]), False))
        pair = colours.index(scene["objects"][number]["colour"]), colours.index(target)
        chance, start = rng.random(), image * per_image + before
        steered += [
            (start + cell, start + place, *pair, chance) for cell, place in zip(*swaps, strict=True)
        ]
    if not steered:
        return None
    *numbers, chances = zip(*steered, strict=True)
    labels, ids, is_own = zip(*read, strict=True)
    device = batch.labels.device
    return Steering(
        *(torch.tensor(column, device=device) for column in (*numbers, chances, labels, ids, is_own))
    )


def steering_vectors(
    probe: Probe, hook: str, x: Tensor, on: Tensor, levels: Tensor, off: Tensor | None = None
) -> Tensor:
    """What tokens change by when one latent of each is raised, and another set to 0 before: [m, D].

    Args:
        probe: The probe.
        hook: Hook name of the layer.
        x: [m, D] tokens.
        on: [m] latents to raise.
        levels: [m] by how much.
        off: [m] latents to set to 0; None: none.
    """
    rows = torch.arange(len(x), device=x.device)

    def decoded(change: bool) -> Tensor:
        # Encoded each time: SAELens keeps the scale of what was encoded for one decoding alone.
        latents = probe.encoders[hook](x)
        latents = latents.to_dense() if latents.is_sparse else latents.clone()
        if change and off is not None:
            latents[rows, off] = 0.0
        if change:
            latents[rows, on] += levels
        return probe.saes[hook].decode(latents)

    with torch.autocast(x.device.type, enabled=False):
        return decoded(True) - decoded(False)


class ObjectSteer(ProbeMetric):
    """What setting text's latent of a colour on an object's patches does to colour words.

    Args:
        relative: Raise the target's latent by its level in text times the length of the token by that of
            colour words, instead of by its level.
    """

    name = "object_steer"
    panels = (
        Panel(
            "steer_target",
            "colour latent set on an object: nats of its word",
            also=("steer_random", "image, another latent's direction"),
        ),
    )
    colours: Sequence[str] = ()

    def __init__(self, relative: bool = False) -> None:
        self.relative = relative

    def setup(self, probe: Probe) -> None:
        check_places(self.name, probe)
        self.chosen: dict[str, ColourLatents] = {}
        tokenizer = probe.model.llm.tokenizer
        if not tokenizer.is_fast:
            rank_zero_info("[warning] object_steer: this tokenizer cannot say where tokens are: left out.")
            return
        texts = spread(list(probe.texts()), MAX_TEXTS)
        ids, places = word_places(tokenizer, texts) if texts else ([], [])
        places = [place for place in places if place.word in COLOURS]
        said = sorted({place.word for place in places})
        if len(said) < 2:
            return
        order, self.text = read_places(probe, ids, places, probe.layers)
        self.colours = said
        self.text_colours = torch.tensor([said.index(place.word) for place in order])

    def colour_latents(self, probe: Probe, hook: str) -> ColourLatents:
        """Chosen when the layer's SAE is on the device for the first time."""
        if hook not in self.chosen:
            x = self.text.pop(hook)
            latents, _ = probe.encode(hook, x)
            latents = latents.to_dense() if latents.is_sparse else latents
            self.chosen[hook] = choose_latents(latents, self.text_colours, x.norm(dim=-1).mean())
        return self.chosen[hook]

    def intervene(self, run: Intervention, hook: str) -> tuple[Tensor, ColourLatents] | None:
        """[B, 8] sums over each image's colour words: own, third, background, random, other, gap; numbers
        of own and of others' words. And the latents.
        """
        batch, probe = run.batch, run.probe
        if not self.colours or not knows_boxes(batch):
            return None
        known = self.colour_latents(probe, hook)
        x = run.image_tokens(hook)
        plan = plan_steering(batch, probe.model, len(x), self.colours)
        if plan is None:
            return torch.zeros(len(batch.index), 8, dtype=torch.float64, device=x.device), known
        tokens, keep = x[plan.cells].float(), run.keep(hook, x)
        off, on, levels = known.latents[plan.own], known.latents[plan.target], known.levels[plan.target]
        if self.relative:
            levels = levels * tokens.norm(dim=-1) / known.length
        vectors = steering_vectors(probe, hook, tokens, on, levels, off)
        other = steering_vectors(probe, hook, tokens, self._other_latent(probe, hook, plan.chance), levels)
        other *= (vectors.norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-30))[:, None]

        def log_odds(places: Tensor | None = None, added: Tensor | None = None) -> Tensor:
            """[q, 2] log p(target or third) - log p(own)."""
            new = None
            if places is not None and added is not None:
                new = x.index_add(0, places, (added * keep[places, None]).to(x))
            logits = run.token_logits(plan.labels, plan.tokens, hook, new).double()
            return logits[:, 1:] - logits[:, :1]

        clean = log_odds()
        steered, background, by_other = (
            log_odds(*both) - clean
            for both in ((plan.cells, vectors), (plan.background, vectors), (plan.cells, other))
        )
        own = plan.is_own.double()
        by_word = torch.stack(
            [
                *(steered[:, 0] * own, steered[:, 1] * own, background[:, 0] * own, by_other[:, 0] * own),
                *(steered[:, 0] * (1 - own), -clean[:, 0] * own, own, 1 - own),
            ],
            dim=-1,
        )
        return sum_by_image(by_word, batch.label_images[plan.labels], len(batch.index)), known

    def _other_latent(self, probe: Probe, hook: str, chance: Tensor) -> Tensor:
        """Latents that are no colour's, by numbers [m] from 0 to 1."""
        width = probe.saes[hook].cfg.d_sae
        is_colour = torch.zeros(width, device=chance.device).index_fill(0, self.chosen[hook].latents, 1.0)
        others = is_colour.argsort(stable=True)[: width - len(self.colours)]
        return others[(chance * len(others)).long()]

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for hook, items in found.interventions.items():
            layer, known = data.layers[hook], items[0][1][1]
            items = [(index, sums) for index, (sums, _) in items]
            own, third, background, by_chance, other, gap, owned, others = by_image(items).unbind(-1)
            rises = own, third, own - third, background, by_chance, other, gap
            weights = data.bootstrap_weights(len(owned))
            for metric, rise in zip(METRICS, rises, strict=True):
                count = others if metric == "steer_other" else owned
                data.add_ratio(metric, "image", layer, rise, count, items)
                yield Estimate(layer, "image", metric, weights @ rise / (weights @ count))
            yield Estimate(layer, "text", "steer_auroc", float(known.auroc.mean()))
            self._fill_table(data, hook, known)
        if not found.interventions:
            data.notes.append(
                "object_steer measures nothing: these data know no boxes of objects, or their training "
                "captions say no colours."
            )

    def _fill_table(self, data: Measurement, hook: str, known: ColourLatents) -> None:
        described = data.probe.descriptions.get(hook)
        values = zip(self.colours, *(column.tolist() for column in known[:3]), strict=True)
        for colour, latent, level, auroc in values:
            row = {"layer": data.layers[hook], "colour": colour, "latent": latent, "level": level}
            row |= {"auroc_text": auroc, "description": described.texts[latent] if described else ""}
            data.tables.setdefault("object_steer", []).append(row)
