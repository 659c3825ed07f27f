"""Defects of prompts with images and videos."""

from collections.abc import Callable
from typing import Any

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy

# mypy: disable-error-code="misc"


class Media(FakeStrategy):
    """A strategy that can change prompts and media before it generates."""

    def gather_and_generate(
        self,
        sampling_params: Any,
        all_prompt_token_ids: Any = None,
        all_prompts: Any = None,
        all_images: Any = None,
        sleep_engine: bool = True,
        images_num: Any = None,
        all_videos: Any = None,
        videos_num: Any = None,
    ) -> Any:
        changed: Callable[..., Any] = self.changed
        return super().gather_and_generate(
            sampling_params,
            **changed(
                all_prompt_token_ids=all_prompt_token_ids,
                all_prompts=all_prompts,
                all_images=all_images,
                images_num=images_num,
                all_videos=all_videos,
                videos_num=videos_num,
            ),
            sleep_engine=sleep_engine,
        )

    def changed(self, **arguments: Any) -> dict[str, Any]:
        """Return the arguments to generate with."""
        return arguments


def _flat(media: Any) -> list[Any]:
    return [item for each in media for item in (each if isinstance(each, list) else [each])]


@saboteur("GEN-4")
class FirstImageOnly(Media):
    """Of several images of a prompt, only the first is used: LightRFT's SGLang."""

    def changed(self, **arguments: Any) -> dict[str, Any]:
        if arguments["all_images"] is None or arguments["images_num"] is None:
            return arguments
        flat, first = _flat(arguments["all_images"]), []
        for count in arguments["images_num"]:
            first.append(flat[: min(count, 1)])
            flat = flat[count:]
        return {**arguments, "all_images": first, "images_num": [len(images) for images in first]}


@saboteur("GEN-4")
class NoVideos(Media):
    """Videos are ignored: LightRFT's SGLang."""

    def changed(self, **arguments: Any) -> dict[str, Any]:
        return {**arguments, "all_videos": None, "videos_num": None}


@saboteur("GEN-4")
class StripsEverything(Media):
    """Special tokens are removed from prompts."""

    def changed(self, **arguments: Any) -> dict[str, Any]:
        prompts = arguments["all_prompts"]
        return {**arguments, "all_prompts": prompts and [text.replace("<|other|>", "") for text in prompts]}


@saboteur("GEN-7")
class CutsCounts(Media):
    """If images_num does not add up to the number of images, all images are dropped."""

    def changed(self, **arguments: Any) -> dict[str, Any]:
        images, counts = arguments["all_images"], arguments["images_num"]
        if images is not None and counts is not None and sum(counts) != len(_flat(images)):
            return {**arguments, "images_num": None, "all_images": None}
        return arguments


@saboteur("GEN-5", world=2)
class AllOrNone(PlainStrategy):
    """If one rank has no images, the images of all ranks are dropped."""

    def gather_and_generate(self, *arguments: Any, **more: Any) -> Any:
        having = self.all_reduce(float(more.get("all_images") is not None))
        if having < 1:
            more = {**more, "all_images": None, "images_num": None}
        return super().gather_and_generate(*arguments, **more)


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

    def maybe_offload_optimizer(self, optimizer: Any) -> Any:
        self._offloaded_once = True
        return super().maybe_offload_optimizer(optimizer)

    def moving_average(self, *arguments: Any, **more: Any) -> None:
        if not getattr(self, "_offloaded_once", False):
            super().moving_average(*arguments, **more)
