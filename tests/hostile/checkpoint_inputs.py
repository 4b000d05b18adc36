"""Tries whose checkpoint is wrong: its config, its index, its shards, its companion files."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

from json_mutations import Spoilt, spoil
from safetensors_mutations import FLIPPED, spoil_shard
from tries import Try, words
from workshop import Run, Workshop

# Verbs by how often: the cheap and the writing ones most.
READERS = {
    "convert": 6,
    "convert cast": 2,
    "convert copy": 1,
    "convert reshard": 2,
    "dry run": 2,
    "inspect": 2,
    "inspect json": 1,
    "plan": 2,
    "plan json": 1,
    "verify": 2,
    "eval": 2,
    "search": 1,
    "generate": 1,
    "distill": 1,
}
# Verbs that take the converted checkpoint.
CONVERTED = {
    "inspect": 2,
    "plan": 1,
    "verify": 2,
    "eval": 2,
    "generate": 1,
    "export": 3,
    "push": 3,
    "convert": 2,
    "search": 1,
}
# Fields that decide a weight's shape: of another type they cannot mean anything.
SIZES = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "vocab_size",
    "moe_intermediate_size",
    "n_routed_experts",
}
WORD_TYPES = (str, list, dict)


def config(shop: Workshop, chance: random.Random) -> Try:
    """config.json of the source."""
    box = shop.box(chance.choice(["deepseek", "glm", "fp8"]), "try")
    path = box / "source" / "config.json"
    spoilt = spoil(path.read_bytes(), chance)
    path.write_bytes(spoilt.data)
    verb = _verb(chance, READERS, box)
    return _reading(box, verb, "config.json", spoilt, _config_is_fatal(spoilt))


def converted_config(shop: Workshop, chance: random.Random) -> Try:
    """config.json of a converted checkpoint."""
    box = shop.box(chance.choice(["deepseek", "glm"]), "try")
    path = box / "converted" / "config.json"
    spoilt = spoil(path.read_bytes(), chance)
    path.write_bytes(spoilt.data)
    return _of_converted(shop, chance, box, "config.json", spoilt, _config_is_fatal(spoilt))


def index(shop: Workshop, chance: random.Random) -> Try:
    """model.safetensors.index.json: its mapping most of all."""
    box = shop.box(chance.choice(["deepseek", "fp8"]), "try")
    path = box / "source" / "model.safetensors.index.json"
    data = path.read_bytes()
    weight_map = json.loads(data)["weight_map"]
    if chance.random() < 0.3:
        spoilt = _other_shard(data, weight_map, chance)
    else:
        spoilt = spoil(data, chance, ("weight_map",) if chance.random() < 0.7 else ())
    path.write_bytes(spoilt.data)
    verb = _verb(chance, READERS, box)
    fatal = spoilt.fatal
    # Of the weight_map all but an equal value is a lie.
    if spoilt.path[:1] == ("weight_map",):
        fatal = True
    return _reading(box, verb, path.name, spoilt, fatal)


def shard(shop: Workshop, chance: random.Random) -> Try:
    """A weight file of the source, or of a converted checkpoint."""
    ours = chance.random() < 0.25
    box = shop.box(chance.choice(["deepseek", "glm"] if ours else ["deepseek", "glm", "fp8"]), "try")
    folder = box / ("converted" if ours else "source")
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    spoilt = spoil_shard(path.read_bytes(), chance)
    path.unlink()  # a converted shard may be the source's own file
    path.write_bytes(spoilt.data)
    if ours:
        return _of_converted(shop, chance, box, path.name, spoilt, spoilt.fatal)
    verb = _verb(chance, READERS, box)
    return _reading(box, verb, path.name, spoilt, spoilt.fatal)


def companion_json(shop: Workshop, chance: random.Random) -> Try:
    """Settings beside the weights: tokenizer, generation, special tokens, adapters."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(["convert", "convert", "eval", "generate", "distill", "export", "push", "search"])
    folder = box / ("converted" if verb in ("export", "push") else "source")
    name = chance.choice(
        ["tokenizer_config.json"] * 3
        + ["generation_config.json"] * 2
        + ["tokenizer.json", "adapter_config.json", "special_tokens_map.json", "chat_template.json"]
    )
    path = folder / name
    if not path.exists():
        path.write_text(json.dumps(_COMPANIONS[name]))
    spoilt = spoil(path.read_bytes(), chance)
    if name == "tokenizer_config.json" and chance.random() < 0.25:
        settings = json.loads(path.read_bytes())
        settings["auto_map"] = chance.choice(
            [{"AutoTokenizer": ["evil/repo--tok.Tok", None]}, ["a.b"], "a.b", {"x": 1}]
        )
        spoilt = Spoilt(json.dumps(settings).encode(), f"auto_map is {settings['auto_map']}", ("auto_map",))
    path.write_bytes(spoilt.data)
    names = (*spoilt.names, name, name.partition("_")[0], "tokenizer")
    return Try(
        f"{folder.name}/{name}: {spoilt.what}; {verb}",
        box,
        words(verb),
        None,
        names,
        check=_no_foreign_code if verb == "convert" else None,
    )


_COMPANIONS = {
    "adapter_config.json": {
        "peft_type": "LORA",
        "base_model_name_or_path": "a/b",
        "r": 8,
        "target_modules": ["q_a_proj"],
    },
    "special_tokens_map.json": {"eos_token": "</s>", "unk_token": {"content": "<unk>", "lstrip": False}},
    "chat_template.json": {"chat_template": "{{ messages }}"},
}


def companion_file(shop: Workshop, chance: random.Random) -> Try:
    """What stands where a companion file should: a pipe, a folder, a link to elsewhere, a file nobody may read."""
    box = shop.box("deepseek", "try")
    verb = chance.choice(["convert", "convert", "convert copy", "export", "push", "distill", "eval", "inspect"])
    folder = box / ("converted" if verb in ("export", "push") else "source")
    name = chance.choice(
        ["tokenizer.json", "LICENSE", "README.md", "chat_template.jinja", "encoding/format.py", "extra.model"]
    )
    if chance.random() < 0.15:
        name = chance.choice(["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
    way = chance.choice(list(_INSTEAD))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if way != "unreadable":
        path.unlink(missing_ok=True)
    _INSTEAD[way](path)
    return Try(f"{folder.name}/{name} is {way}; {verb}", box, words(verb), None, (path.name, name, str(folder.name)))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.txt").write_text("inside")


def _link_outside(path: Path) -> None:
    path.symlink_to(
        os.path.relpath(path.parents[len(path.parts) - _depth(path) - 1] / "outside/secret.txt", path.parent)
    )


def _depth(path: Path) -> int:
    """Parts of a path down to the sandbox."""
    return path.parts.index("try") + 1


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _unreadable(path: Path) -> None:
    if not path.exists():
        path.write_text("nobody reads this")
    path.chmod(0)


def _big(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(2**26)


_INSTEAD: dict[str, Callable[[Path], None]] = {
    "a pipe": _pipe,
    "a socket": _socket,
    "a folder": _folder,
    "a link to a file outside": _link_outside,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": _link("nothing.txt"),
    "a link to /dev/zero": _link("/dev/zero"),
    "a link to /proc/self/environ": _link("/proc/self/environ"),
    "a link to a folder": _link("."),
    "unreadable": _unreadable,
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "64 MiB of nothing": _big,
}


def strange_names(shop: Workshop, chance: random.Random) -> Try:
    """Files and folders of strange names beside the weights."""
    box = shop.box(chance.choice(["deepseek", "glm"]), "try")
    verb = chance.choice(["convert", "convert copy", "export", "push", "inspect", "distill"])
    folder = box / ("converted" if verb in ("export", "push") else "source")
    name = chance.choice(
        [
            b"LICENSE [bold]",
            b"LICENSE \xff\xfe",
            b"LICENSE\nX",
            b"NOTICE \xe2\x80\xae.txt",
            b"LICENSE\x1b[2J",
            b"nul.model",
            b"CON.model",
            b"LICENSE" + b"x" * 230,
            b"tokenizer\xff.json",
            b"encoding/\xff.py",
            b"encoding/a/b/c/d.py",
            b"encoding/..py",
            b"encoding/[x].py",
            b".env",
            b".git/config",
            b"training/optimizer.pt",
            b"x.bin",
            b"x.partial",
            b".indexcache_convert.json",
            b"indexcache_recipe.json",
            b"LICENSE\\..\\x",
            b"*.model",
            b"extra.safetensors",
        ]
    )
    path = os.path.join(os.fsencode(folder), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(b"{}")
    shown = os.fsdecode(name)
    names = (shown, ascii(shown)[1:-1], repr(shown)[1:-1], shown.rpartition("/")[2], folder.name)
    return Try(f"{folder.name} holds {shown!a}; {verb}", box, words(verb), None, names)


# ---- shared -------------------------------------------------------------------------------------------------------


def _verb(chance: random.Random, weights: dict[str, int], box: Path) -> str:
    found = {verb: weight for verb, weight in weights.items() if verb != "verify" or (box / "converted").exists()}
    return chance.choices(list(found), list(found.values()))[0]


def _reading(box: Path, verb: str, file: str, spoilt: Spoilt, fatal: bool | None) -> Try:
    # Distilling refuses fp8 weights before it looks at them.
    # A file that is valid, of weights that are not, cannot be told from the others: the checkpoint is named.
    names = (*spoilt.names, file, "quantised", *(["source"] if spoilt.what == FLIPPED else []))
    # Damage of an indexer that the pattern drops, or of what a verb does not look at, may pass.
    must = True if fatal and verb not in ("inspect", "plan", "plan json") else None
    return Try(f"{file}: {spoilt.what}; {verb}", box, words(verb), must, names)


def _of_converted(
    shop: Workshop, chance: random.Random, box: Path, file: str, spoilt: Spoilt, fatal: bool | None
) -> Try:
    verb = chance.choices(list(CONVERTED), list(CONVERTED.values()))[0]
    argv = words(verb)
    if verb == "convert":
        argv = ["convert", "converted", "output"]
    elif verb not in ("verify", "export", "push"):
        argv = ["converted" if word == "source" else word for word in argv]
    check = _nothing_pushed if verb == "push" else None
    must = True if fatal and verb not in ("inspect", "plan", "plan json") else None
    what = f"converted/{file}: {spoilt.what}; {verb}"
    return Try(what, box, argv, must, (*spoilt.names, file, "converted"), always=check)


def _other_shard(data: bytes, weight_map: dict[str, str], chance: random.Random) -> Spoilt:
    document = json.loads(data)
    name = chance.choice(list(weight_map))
    others = sorted(set(weight_map.values()) - {weight_map[name]})
    file = chance.choice(
        [*others, "../outside/secret.txt", "model-00009-of-00003.safetensors", "config.json", "/etc/passwd"]
    )
    document["weight_map"][name] = file
    return Spoilt(
        json.dumps(document).encode(), f"{name} is in {file}", (name, file), True, ("weight_map", name), file
    )


def _config_is_fatal(spoilt: Spoilt) -> bool | None:
    """Whether a config with this change cannot mean what the weights are."""
    if spoilt.fatal is not None:
        return spoilt.fatal
    if len(spoilt.path) == 1 and spoilt.path[0] in SIZES and isinstance(spoilt.value, WORD_TYPES):
        return True
    if spoilt.path == ("model_type",) and "is" in spoilt.what:
        return True
    return None


def _no_foreign_code(shop: Workshop, box: Path, run: Run) -> list[str]:
    """No name of somebody else's code in what a conversion writes."""
    found = []
    for path in (box / "output").glob("*.json"):
        try:
            settings = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        named = settings.get("auto_map") if isinstance(settings, dict) else None
        if named and path.name != "config.json":
            found.append(f"{path.name} travels with auto_map {named}")
        if path.name == "config.json" and "--" in json.dumps(named):
            found.append(f"config.json names others' code: {named}")
    return found


def _nothing_pushed(shop: Workshop, box: Path, run: Run) -> list[str]:
    """A refused push leaves no repository with files."""
    files = shop.hub.files("tester/pushed") or {}
    if run.code != 0 and set(files) - {".gitattributes"}:
        return ["a push that failed left files on the Hub"]
    return []


KINDS = {
    "config": config,
    "converted_config": converted_config,
    "index": index,
    "shard": shard,
    "companion_json": companion_json,
    "companion_file": companion_file,
    "strange_names": strange_names,
}
