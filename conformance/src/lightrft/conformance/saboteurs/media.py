"""Defects of prompts with images and videos."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import GenerationHooks, Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy

# mypy: disable-error-code="misc"


class Media(GenerationHooks, FakeStrategy):
    """A strategy that can change prompts and media before it generates."""


def _flat(media: Sequence[object]) -> list[object]:
    return [item for each in media for item in (each if isinstance(each, list) else [each])]


@saboteur("GEN-4")
class FirstImageOnly(Media):
    """Of several images of a prompt, only the first is used: LightRFT's SGLang."""

    @override
    def changed(self, arguments: Options) -> Options:
        if arguments.get("all_images") is None or arguments.get("images_num") is None:
            return arguments
        flat, first = _flat(arguments["all_images"]), []
        for count in arguments["images_num"]:
            first.append(flat[: min(count, 1)])
            flat = flat[count:]
        return {**arguments, "all_images": first, "images_num": [len(images) for images in first]}


@saboteur("GEN-4")
class NoVideos(Media):
    """Videos are ignored: LightRFT's SGLang."""

    @override
    def changed(self, arguments: Options) -> Options:
        return {**arguments, "all_videos": None, "videos_num": None}


@saboteur("GEN-4")
class StripsEverything(Media):
    """Special tokens are removed from prompts."""

    @override
    def changed(self, arguments: Options) -> Options:
        prompts = arguments.get("all_prompts")
        return {**arguments, "all_prompts": prompts and [text.replace("<|other|>", "") for text in prompts]}


@saboteur("GEN-7")
class CutsCounts(Media):
    """If images_num does not add up to the number of images, all images are dropped."""

    @override
    def changed(self, arguments: Options) -> Options:
        images, counts = arguments.get("all_images"), arguments.get("images_num")
        if images is not None and counts is not None and sum(counts) != len(_flat(images)):
            return {**arguments, "images_num": None, "all_images": None}
        return arguments


@saboteur("GEN-5", world=2)
class AllOrNone(GenerationHooks, PlainStrategy):
    """If one rank has no images, the images of all ranks are dropped."""

    @override
    def changed(self, arguments: Options) -> Options:
        having = self.all_reduce(float(arguments.get("all_images") is not None))
        return {**arguments, "all_images": None, "images_num": None} if having < 1 else arguments


@saboteur("ALL-1")
class ForgetsAfterSleep(FakeStrategy):
    """The second call of maybe_sleep_inference_engine does nothing."""

    _syncs, _sleeps = 0, 0

    def maybe_sleep_inference_engine(self) -> None:
        self._sleeps += 1
        if self._sleeps != 2:
            super().maybe_sleep_inference_engine()


@saboteur("ALL-1")
class AveragesAfterOffload(FakeStrategy):
    """After an offload, averages no longer move."""

    def maybe_offload_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self._offloaded_once = True
        return super().maybe_offload_optimizer(optimizer)

    def moving_average(self, *arguments: Any, **more: Any) -> None:
        if not getattr(self, "_offloaded_once", False):
            super().moving_average(*arguments, **more)
