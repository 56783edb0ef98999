"""When a plan's values are read for the last time: what may be freed, and what may be added to in place."""

from gaternet.skipping.plan import DENSE, Step


def finish(steps: list[Step], output: str) -> list[Step]:
    """The steps with `free` and `in_place` filled in, and additions done by the convolutions before them."""
    made = {step.out: number for number, step in enumerate(steps)}
    readers: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for source in dict.fromkeys(step.sources):
            readers.setdefault(source, []).append(number)
    for name, numbers in readers.items():
        if name != output:
            steps[numbers[-1]].free.append(name)
    for number, step in enumerate(steps):
        if step.kind == "add":
            if (conv := _expanding_conv(number, steps, made, readers)) is not None:
                conv.pattern = DENSE
            step.in_place = _in_place(step, steps, made, readers)
    fused = {}
    for number, step in enumerate(steps):
        if (conv := _adding_conv(number, steps, made, readers)) is not None:
            assert step.in_place is not None
            target = step.sources[step.in_place]
            free = [name for name in [*conv.free, *step.free] if name != conv.out]
            conv.adds, conv.relu, conv.pattern, conv.free = target, step.relu, DENSE, free
            conv.sources = [*conv.sources, target]
            conv.out = step.out
            fused[number] = conv
    return [step for number, step in enumerate(steps) if number not in fused]


def _expanding_conv(number: int, steps: list[Step], made: dict[str, int], readers: dict[str, list[int]]) -> Step | None:
    """The earlier of two convolutions with unlike open filters, made for nothing but their sum."""
    sources = steps[number].sources
    if any(source not in made or readers[source] != [number] for source in sources):
        return None
    first, second = sorted((steps[made[source]] for source in sources), key=lambda maker: made[maker.out])
    if first.pattern == second.pattern or DENSE in (first.pattern, second.pattern):
        return None
    plain = first.kind == "conv" and first.mask is None and first.conv is not None and first.conv.groups == 1
    return first if plain else None


def _in_place(step: Step, steps: list[Step], made: dict[str, int], readers: dict[str, list[int]]) -> int | None:
    """The number of a dense source that nothing else needs, and whose memory no other value shares."""
    for number, source in enumerate(step.sources):
        if source not in made or step.sources.count(source) > 1:
            continue
        maker = steps[made[source]]
        fresh = maker.kind in ("conv", "add") and maker.pattern == DENSE and source in step.free
        if fresh and all(steps[reader].kind in ("conv", "add") for reader in readers[source]):  # none gives a view
            return number
    return None


def _adding_conv(number: int, steps: list[Step], made: dict[str, int], readers: dict[str, list[int]]) -> Step | None:
    """The convolution that can do the addition of this number as well."""
    step = steps[number]
    if step.in_place is None:
        return None
    target, other = step.sources[step.in_place], step.sources[1 - step.in_place]
    place = made.get(other, number)
    conv = steps[place]
    if conv.kind != "conv" or conv.relu or conv.mask or conv.conv is None or conv.conv.groups > 1:
        return None
    if target in conv.sources:  # it reads what it would overwrite
        return None
    if readers[other] != [number] or made[target] > place or any(place < n < number for n in readers[target]):
        return None
    return conv
