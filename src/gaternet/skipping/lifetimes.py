"""When a plan's values are read for the last time: what may be freed, and what may be added to in place."""

from gaternet.skipping.plan import DENSE, Step


def finish(steps: list[Step], output: str) -> list[Step]:
    """The steps with `free` and `in_place` filled in, and additions done by the convolutions before them."""
    return _Lifetimes(steps, output).finish()


class _Lifetimes:
    def __init__(self, steps: list[Step], output: str) -> None:
        self.steps, self.output = steps, output
        self.made = {step.out: number for number, step in enumerate(steps)}  # value -> the number of its step
        self.readers: dict[str, list[int]] = {}
        for number, step in enumerate(steps):
            for source in dict.fromkeys(step.sources):
                self.readers.setdefault(source, []).append(number)

    def finish(self) -> list[Step]:
        for name, numbers in self.readers.items():
            if name != self.output:
                self.steps[numbers[-1]].free.append(name)
        for step in self.steps:
            if step.kind == "add":
                if (conv := self._expanding_conv(step)) is not None:
                    conv.pattern = DENSE
                step.in_place = self._in_place(step)
        return [step for step in self.steps if not self._add_by_conv(step)]

    def _expanding_conv(self, step: Step) -> Step | None:
        """Of two convolutions with unlike open filters whose only reader is this addition: the earlier.

        It writes a dense result, with zeros at closed filters, to which the later one adds.
        """
        number = self.made[step.out]
        if any(source not in self.made or self.readers[source] != [number] for source in step.sources):
            return None
        first, second = (self.steps[place] for place in sorted(self.made[source] for source in step.sources))
        if first.pattern == second.pattern or DENSE in (first.pattern, second.pattern):
            return None
        plain = first.kind == "conv" and first.mask is None and first.conv is not None and first.conv.groups == 1
        return first if plain else None

    def _in_place(self, step: Step) -> int | None:
        """The number of a dense source that nothing else needs, and whose memory no other value shares."""
        for number, source in enumerate(step.sources):
            if source not in self.made or step.sources.count(source) > 1:
                continue
            maker = self.steps[self.made[source]]
            fresh = maker.kind in ("conv", "add") and maker.pattern == DENSE and source in step.free
            readers = (self.steps[reader] for reader in self.readers[source])
            if fresh and all(reader.kind in ("conv", "add") for reader in readers):  # none gives a view
                return number
        return None

    def _add_by_conv(self, step: Step) -> bool:
        """Let the convolution that makes one summand add it to the other, where it can; then the step is done."""
        if step.in_place is None:
            return False
        target, other, number = step.sources[step.in_place], step.sources[1 - step.in_place], self.made[step.out]
        place = self.made.get(other, number)
        conv = self.steps[place]
        if conv.kind != "conv" or conv.relu or conv.mask or conv.conv is None or conv.conv.groups > 1:
            return False
        if target in conv.sources:  # it reads what it would overwrite
            return False
        between = any(place < reader < number for reader in self.readers[target])
        if self.readers[other] != [number] or self.made[target] > place or between:
            return False
        conv.adds, conv.relu, conv.pattern, conv.sources = target, step.relu, DENSE, [*conv.sources, target]
        conv.free = [name for name in [*conv.free, *step.free] if name != conv.out]
        conv.out = step.out
        return True
