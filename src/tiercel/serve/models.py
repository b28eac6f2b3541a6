"""Models in memory: loaded by the first request, kept for `keep_alive`, unloaded when unused.

    lease = await models.lease("smollm2")     loads it if need be; it stays while the lease is held
    lease.loaded.engine.submit(…)
    lease.release(keep_alive)                 it may be unloaded after `keep_alive` seconds

Two names of one file share the network.  Where a new model does not fit, the least recently used idle one is unloaded.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiercel.errors import DoesNotFit, ModelNotFound, RequestError
from tiercel.hub import local_models
from tiercel.runtime.stat_cache import stat_stamp
from tiercel.serve.errors import BUSY, APIError, log
from tiercel.serve.settings import Settings

if TYPE_CHECKING:
    from tiercel.engine import AsyncEngine
    from tiercel.llm import Model
    from tiercel.tokenizer.tokenizer import Tokenizer

Opener = Callable[[Path, Settings], "tuple[Model, AsyncEngine]"]  # the engine is not started yet
Key = tuple[int, int, int, "str | None"]  # device, inode, mtime and template: what makes two names one model


def open_model(path: Path, settings: Settings) -> tuple[Model, AsyncEngine]:
    """Load a model and make its engine, sized to this machine's memory.  Raises DoesNotFit, FormatError."""
    import tiercel
    from tiercel.engine import AsyncEngine, Engine
    from tiercel.hub.planning import fit

    size: dict[str, Any]
    context: int | None
    if settings.device == "cpu":  # a GPU's slots see to their memory themselves
        fitted = fit(path, slots=settings.slots, context=settings.context or None)
        log.info("%s", fitted.line)
        size = {"slots": fitted.slots, "cache_bytes": fitted.cache, "state_bytes": fitted.states}
        context = fitted.context
    else:
        size, context = {"slots": settings.slots}, settings.context or None
    if settings.cache_bytes is not None:
        size["cache_bytes"] = settings.cache_bytes
    parallel = settings.tensor_parallel
    model = tiercel.load(path, device=settings.device, max_length=context, tensor_parallel=parallel)
    spill = Path(settings.spill).expanduser() if settings.spill else None
    engine = Engine(model, max_queue=settings.queue, spill=spill, drafter=_drafter(settings, model), **size)
    engine.warm_up()
    return model, AsyncEngine(engine)


def _drafter(settings: Settings, model: Any) -> Any:
    """What makes the engine's drafters: the draft model where it has this model's vocabulary, else prompt lookup."""
    import tiercel
    from tiercel.engine.draft_model import drafter_for

    if settings.draft_model:
        draft = tiercel.load(settings.draft_model, device=settings.device)
        try:
            return drafter_for(model, draft, settings.slots)
        except RequestError as error:
            log.warning("%s", error)
    return drafter_for(model)


@dataclass
class ServedModel:
    """A name that clients use: the file behind it, and what its Modelfile added (`create`).

    extras: parameters, system, template, messages, license.  adapter: a folder in PEFT's form.
    """

    name: str
    local: local_models.LocalModel
    extras: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None


@dataclass(eq=False)
class Loaded:
    """A model in memory.

    expires, last_used: seconds on the monotonic clock; inf for ever.  users: leases that are held.
    tokens: prompt tokens of the requests in flight.  size: bytes.
    adapters: digest, which is the name in the network → the name a client asks for.
    """

    name: str
    path: Path
    model: Model
    engine: AsyncEngine
    expires: float = math.inf
    users: int = 0
    tokens: int = 0
    last_used: float = field(default_factory=time.monotonic)
    size: int = 0
    adapters: dict[str, str] = field(default_factory=dict)

    def load_adapter(self, served: ServedModel) -> str | None:
        """Load the adapter of a name, if it has one, and give its digest: of what its files hold now."""
        if served.adapter is None:
            return None
        from tiercel.weights.adapters import digest

        key = digest(served.adapter)
        if key not in self.adapters:
            self.model.load_adapter(key, served.adapter, lock=self.engine.engine.between_steps())
            self.adapters[key] = served.name
        return key


class Lease:
    """One request's hold on a loaded model.

    load_seconds: how long loading took, 0 where it was in memory.  adapter: its name in the network.
    """

    def __init__(self, models: Models, served: ServedModel, loaded: Loaded, load_seconds: float) -> None:
        self.models, self.served, self.loaded, self.load_seconds = models, served, loaded, load_seconds
        self._held, self._tokens = True, 0
        self.adapter: str | None = None
        loaded.users += 1

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.  Raises RequestError where it has none."""
        tokenizer = self.loaded.model.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.served.name} has no tokenizer: give it token ids")
        return tokenizer

    def reserve(self, tokens: int) -> None:
        """Count a prompt.  Raises APIError 503 when the prompts in flight are more than the queue may hold."""
        loaded, settings = self.loaded, self.models.settings
        max_tokens = settings.queue_contexts * loaded.model.max_length
        if loaded.tokens and loaded.tokens + tokens > max_tokens:
            raise APIError(503, BUSY, code="busy", retry=2)
        loaded.tokens += tokens
        self._tokens += tokens

    def release(self, keep_alive: float | None = None) -> None:
        """Give the model back; it may be unloaded after `keep_alive` seconds (None: the server's default)."""
        if not self._held:
            return
        self._held = False
        self.loaded.users -= 1
        self.loaded.tokens -= self._tokens
        self.loaded.last_used = time.monotonic()
        if keep_alive is None:
            keep_alive = math.inf if self.loaded.name in self.models.pinned else self.models.settings.keep_alive
        self.loaded.expires = self.loaded.last_used + keep_alive
        self.models.wake.set()


class Models:
    """The models of a server: which names there are, and which models are in memory.

    paths: names given on the command line for files.  adapters: "base:name" of the command line → base, folder.
    pinned: names that stay loaded unless a request says otherwise.  lock: one model is loaded at a time.
    """

    def __init__(self, settings: Settings, opener: Opener = open_model) -> None:
        self.settings, self.opener = settings, opener
        self.loaded: dict[Key, Loaded] = {}
        self.paths: dict[str, Path] = {}
        self.adapters: dict[str, tuple[str, Path]] = {}
        self.pinned: set[str] = set()
        self.lock = asyncio.Lock()
        self.wake = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None
        self._listed: tuple[object, list[ServedModel]] | None = None

    # ── names

    def find(self, name: str) -> ServedModel:
        """The model of a name.  A client's name is never a path.  Raises APIError 404."""
        short = name.removesuffix(":latest")
        if short in self.adapters:
            base, folder = self.adapters[short]
            below = self.find(base)
            return ServedModel(short, below.local, {**below.extras, "from": base, "adapter": folder.name}, folder)
        if path := self.paths.get(short):
            at_path = local_models.LocalModel(short, path, _bytes(path), "", path.stat().st_mtime, "path")
            return ServedModel(short, at_path)
        try:
            named = local_models.short_name(name) or local_models.repo_name(name)
            local = local_models.find(name) if named and not local_models.is_path(name) else None
        except ModelNotFound:
            local = None
        if local is None or local.source == "path":
            raise APIError(404, f"model '{name[:200]}' not found", param="model")
        return ServedModel(name, local, extras_of(local), local_models.adapter_of(local.name))

    def is_given(self, name: str) -> bool:
        """Whether a name stands for a file or adapter of the command line."""
        short = name.removesuffix(":latest")
        return short in self.paths or short in self.adapters

    def all(self) -> list[ServedModel]:
        """Every model that a client may name; the same list, not to be changed, as long as no file has changed."""
        named = [*self.paths.items(), *self.adapters.items()]
        stamp = [named, [stat_stamp(path) for path in self.paths.values()], local_models.listing_stamp()]
        if self._listed is None or self._listed[0] != stamp:
            here = local_models.list_models()
            found = [
                ServedModel(local.name, local, extras_of(local), local_models.adapter_of(local.name)) for local in here
            ]
            self._listed = stamp, [*(self.find(name) for name in (*self.paths, *self.adapters)), *found]
        return self._listed[1]

    # ── memory

    async def lease(self, name: str) -> Lease:
        """Load a model if need be, and hold it.  Raises APIError 404, DoesNotFit, FormatError."""
        served = self.find(name)  # a few looks at the disk: a thread would take longer to begin
        key = _key(served)
        began = time.monotonic()
        if key not in self.loaded:
            async with self.lock:
                if key not in self.loaded:
                    self.loaded[key] = await self._load(served)
        elif served.adapter is None:
            return Lease(self, served, self.loaded[key], 0.0)
        lease = Lease(self, served, self.loaded[key], time.monotonic() - began)
        try:
            lease.adapter = await asyncio.to_thread(lease.loaded.load_adapter, served)
        except BaseException:
            lease.release()
            raise
        return lease

    async def _load(self, served: ServedModel) -> Loaded:
        while len(self.loaded) >= self.settings.models:
            await self._make_room()
        while True:
            try:
                model, engine = await asyncio.to_thread(self.opener, served.local.path, self.settings)
                break
            except DoesNotFit:
                if not self.loaded:
                    raise
                await self._make_room()
        if model.tokenizer is not None and (template := served.extras.get("template")):
            model.tokenizer.templates["default"] = template
        model.name = served.name
        engine.start()
        log.info("loaded %s", served.name)
        return Loaded(served.name, served.local.path, model, engine, size=served.local.bytes)

    async def _make_room(self) -> None:
        """Unload the least recently used idle model; raises APIError 503 when all are at work."""
        idle = [item for item in self.loaded.items() if item[1].users == 0 and item[1].name not in self.pinned]
        if not idle:
            raise APIError(
                503,
                "all models in memory are at work; try again, or start the server with a larger --set models=N",
                retry=5,
            )
        await self._unload(min(idle, key=lambda item: item[1].last_used)[0])

    async def _unload(self, key: Key) -> None:
        loaded = self.loaded.pop(key)
        await loaded.engine.close(0)
        log.info("unloaded %s", loaded.name)
        del loaded.model, loaded.engine
        await asyncio.to_thread(_collect)

    async def unload(self, name: str) -> bool:
        """Now if it is idle, else when its last answer has ended; False when it was not loaded."""
        loaded = self.loaded.get(_key(await asyncio.to_thread(self.find, name)))
        if loaded is None:
            return False
        loaded.expires = 0.0
        await self._sweep()
        return True

    async def _sweep(self) -> None:
        now = time.monotonic()
        for key, loaded in list(self.loaded.items()):
            if loaded.users == 0 and loaded.expires <= now and self.loaded.get(key) is loaded:
                await self._unload(key)

    def start(self) -> None:
        """Begin to unload models when their time is over; in the event loop."""
        self._sweeper = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            waits = [loaded.expires for loaded in self.loaded.values() if loaded.users == 0]
            wait_seconds = min([*waits, math.inf]) - time.monotonic()
            self.wake.clear()
            try:
                async with asyncio.timeout(None if wait_seconds == math.inf else max(wait_seconds, 0.01)):
                    await self.wake.wait()
            except TimeoutError:
                pass
            await self._sweep()

    async def close(self) -> None:
        """Stop all engines; their memory goes with the process."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        loaded, self.loaded = self.loaded, {}
        await asyncio.gather(*(each.engine.close(0) for each in loaded.values()))


def _collect() -> None:
    """Free what an unloaded model leaves: reference cycles, and unused pages of malloc."""
    from tiercel.runtime.workspace import trim

    gc.collect()
    trim()


def extras_of(local: local_models.LocalModel) -> dict[str, Any]:
    """What a Modelfile added: the extras of its manifest."""
    folder = local_models.store_folder(local.name)
    found = local_models.manifest_of(folder).get("extras")
    return found if isinstance(found, dict) else {}


def _key(served: ServedModel) -> Key:
    """What makes two names one model: the same bytes and the same template."""
    stat = served.local.path.stat()
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, served.extras.get("template")


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()) if f.is_file())
