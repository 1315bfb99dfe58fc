"""Deliberate mistakes: a command line, the exit code, and words of the message that give place and remedy.

``{tmp}`` is a folder with the files of ``places.py``; ``{run}`` is a finished run of two steps.
"""

from __future__ import annotations

from typing import NamedTuple

TINY = "tests/system/tiny.yaml"
MANIFEST = "examples/emoji/shards/train-quick.manifest"
_OLD = "".join(("led", "ger"))
TOKENIZER = "examples/emoji/tokenizer.model"


class Mistake(NamedTuple):
    """One command line.

    Attributes:
        name: Name of the test.
        words: The command line.
        code: Exit code.
        place: Words that say where the mistake is: file and line, key, option, or path.
        remedy: Words that say what to do.
    """

    name: str
    words: str
    code: int
    place: str
    remedy: str


KEYS = [
    Mistake("key", f"train {TINY} sed=1", 2, "override 1 (sed=1) sed", "did you mean 'seed'?"),
    Mistake("nested-key", f"train {TINY} engine.zero_stag=2", 2, "engine.zero_stag", "did you mean 'zero_stage'?"),
    Mistake("key-in-file", "train {tmp}/key.yaml", 2, "/key.yaml:3 seeed", "did you mean 'seed'?"),
    Mistake("renamed-key", f"train {TINY} {_OLD}.every_steps=1", 2, _OLD, "renamed: write 'sample_log'"),
    Mistake("type", f"train {TINY} seed=many", 2, "(seed=many) seed=many", "expected a whole number"),
    Mistake("list-for-number", f"train {TINY} data.lanes=[1]", 2, "data.lanes", "expected a whole number"),
    Mistake("text-for-block", f"train {TINY} engine=fast", 2, "engine=fast", "expected a block of keys"),
    Mistake("choice", f"train {TINY} engine.zero_stage=4", 2, "engine.zero_stage=4", "known here: 0, 1, 2, 3"),
    Mistake("choice-typo", f"train {TINY} engine.precision=bf61", 2, "engine.precision", "did you mean 'bf16'?"),
    Mistake("kind", f"train {TINY} model.connector.kind=hybird", 2, "model.connector.kind=hybird", "'hybrid'?"),
    Mistake("range", f"train {TINY} stages.0.steps=0", 2, "stages.0.steps=0", "must be at least 1"),
    Mistake("learning-rate", f"train {TINY} stages.0.learning_rate=fast", 2, "learning_rate=fast", "expected a number"),
    Mistake("no-value", f"train {TINY} seed", 2, "override 1 (seed)", "expected key=value, for example"),
    Mistake(
        "no-such-stage", f"train {TINY} stages.5.steps=3", 2, "(stages.5.steps=3)", "list of 1 items (numbered from"
    ),
    Mistake("below-a-number", f"train {TINY} seed.x=1", 2, "'x' is a key below 1", "which is not a block"),
    Mistake(
        "bad-override", f"train {TINY} stages=[", 2, "override 1 (stages=[)", "put the whole word in single quotes"
    ),
    Mistake(
        "heads", f"train {TINY} model.decoder.attention.num_kv_heads=2", 2, "num_kv_heads=2", "must divide num_heads=3"
    ),
    Mistake("component", f"train {TINY} stages.0.train=[audio]", 2, "stages.0", "'vision'"),
    Mistake("contradiction", f"train {TINY} model.connector=null", 2, "vision and connector", "set both, or neither"),
    Mistake("warm-up", f"train {TINY} stages.0.warmup_steps=9999", 2, "warmup_steps=9999", "(steps=360)"),
    Mistake(
        "offload",
        f"train {TINY} engine.offload=optimizer engine.zero_stage=0",
        2,
        "offload=optimizer",
        "needs zero_stage=1",
    ),
    Mistake(
        "watchdog",
        f"train {TINY} engine.watchdog.step_seconds=60",
        2,
        "step_seconds=60",
        "must be less than timeout_seconds=60",
    ),
    Mistake(
        "roll-back",
        f"train {TINY} 'bad_steps={{{{policy: roll_back, roll_back_steps: 99}}}}'",
        2,
        "roll_back_steps=99",
        "raise one of these two",
    ),
    Mistake(
        "teachers",
        f"train {TINY} 'stages.0.distill=[{{{{checkpoint: a}}}},{{{{checkpoint: b}}}}]'",
        2,
        "distill",
        "must sum to at most 1",
    ),
    Mistake(
        "two-manifests",
        f"train {TINY} data.datasets.0.shards=[x.tar]",
        2,
        "data.datasets.0",
        "give either a manifest or shards or a pipeline",
    ),
]
FILES = [
    Mistake("no-file", "train absent.yaml", 2, "absent.yaml: no such file", "looked for {cwd}/absent.yaml"),
    Mistake(
        "typo-in-file",
        "train configs/quickstrat.yaml",
        2,
        "configs/quickstrat.yaml",
        "did you mean 'configs/quickstart.yaml'?",
    ),
    Mistake("folder", "train configs", 2, "configs: a folder", "expected a YAML file"),
    Mistake("model-file", "train configs/models/tiny.yaml", 2, "configs/models/tiny.yaml", "the file of a model"),
    Mistake("comparison-file", "train configs/compare/emoji-connectors.yaml", 2, "compare", "mmscale compare"),
    Mistake("run-file-to-compare", f"compare {TINY}", 2, TINY, "docs/evaluation.md"),
    Mistake("brackets", "train {tmp}/brackets.yaml", 2, "/brackets.yaml:4", "expected ',' or '}}'"),
    Mistake("tab", "train {tmp}/tab.yaml", 2, "/tab.yaml:2", "not valid YAML"),
    Mistake("twice", "train {tmp}/twice.yaml", 2, "/twice.yaml:3 seed", "written twice, first at"),
    Mistake("merge-key", "train {tmp}/merge.yaml", 2, "/merge.yaml:2", "use a 'base:' file instead"),
    Mistake("empty-file", "train {tmp}/empty.yaml", 2, "/empty.yaml", "a mapping of keys to values"),
    Mistake("list-file", "train {tmp}/list.yaml", 2, "/list.yaml", "this is a list"),
    Mistake("binary-file", f"train {TOKENIZER}", 2, TOKENIZER, "expected a YAML file"),
    Mistake("no-base", "train {tmp}/no_base.yaml", 2, "/no_base.yaml:1 base=gone.yaml", "no such file ("),
    Mistake("circle", "train {tmp}/circle.yaml", 2, "/circle.yaml", "leads back to"),
    Mistake(
        "no-manifest",
        f"train {TINY} data.datasets.0.manifest=absent.manifest",
        2,
        "data.datasets.0.manifest=absent.manifest",
        "mmscale data ingest",
    ),
    Mistake(
        "relative-to-file",
        "train {tmp}/relative.yaml",
        2,
        "data.datasets.0.manifest=beside.manifest",
        "write {tmp}/beside.manifest",
    ),
    Mistake(
        "text-as-manifest",
        f"train {TINY} data.datasets.0.manifest=README.md",
        1,
        "data.datasets.0.manifest",
        "manifest",
    ),
    Mistake(
        "no-tokenizer",
        f"train {TINY} data.tokenizer.path=absent.model",
        2,
        "(data.tokenizer.path=absent.model) data.tokenizer.path=absent.model",
        "looked for {cwd}/absent.model",
    ),
    Mistake(
        "wrong-tokenizer",
        f"train {TINY} data.tokenizer.path=README.md",
        2,
        "data.tokenizer.path=README.md",
        "set kind: tokenizers",
    ),
    Mistake(
        "small-vocabulary",
        f"train {TINY} model.decoder.vocab_size=100",
        2,
        "model.decoder.vocab_size=100",
        "set at least 2048 rows",
    ),
    Mistake("run-dir-is-a-file", f"train {TINY} run_dir=README.md", 2, "run_dir=README.md", "set a folder"),
    Mistake(
        "no-permission", f"train {TINY} run_dir=/proc/x", 2, "run_dir=/proc/x", "choose a folder with write permission"
    ),
]
VERBS = [
    Mistake("verb", "trian x", 2, "No such command 'trian'", "Did you mean 'train'?"),
    Mistake("sub-verb", "config explian seed", 2, "'explian'", "Did you mean 'explain'?"),
    Mistake("no-config", "train", 2, "Missing argument 'CONFIG'", "Example: mmscale train configs/quickstart.yaml"),
    Mistake("no-ranks", f"launch local {TINY}", 2, "--ranks", "Example: mmscale launch local"),
    Mistake("option-for-key", f"train {TINY} --max-steps 5", 2, "--max-steps", "write max_steps=5"),
    Mistake("option-for-nested-key", f"train {TINY} --zero-stage=2", 2, "--zero-stage", "write engine.zero_stage=2"),
    Mistake("unknown-option", f"train {TINY} --gpus 2", 2, "--gpus", "Example: mmscale train"),
    Mistake(
        "ranks-above-lanes",
        f"launch local {TINY} --ranks 9",
        2,
        "world size 9 does not fit data.lanes=4",
        "start at most 4 ranks",
    ),
    Mistake(
        "validate-ranks",
        f"config validate {TINY} --ranks 9 run_dir={{tmp}}/new",
        2,
        "data.lanes=4",
        "start at most 4 ranks",
    ),
    Mistake("number-option", f"launch local {TINY} --ranks two", 2, "'--ranks'", "valid integer"),
    Mistake("two-outputs", f"config show {TINY} --yaml --json", 2, "--yaml and --json", "give one of the two"),
    Mistake(
        "explain-typo", "config explain engine.zero_stag", 2, "engine.zero_stag", "did you mean 'engine.zero_stage'?"
    ),
    Mistake("size", f"data crops {TINY} --size 1920", 2, "--size", "1920x1080"),
    Mistake("range-of-samples", f"data show {TINY} --samples 3", 2, "--samples", "A:B"),
    Mistake(
        "beyond-the-samples",
        f"data show {TINY} --samples 9000:9001",
        2,
        "--samples 9000:9001",
        "emoji has 1024 samples",
    ),
    Mistake("data-set", f"data show {TINY} --dataset emojis", 2, "--dataset emojis", "the configuration has emoji"),
    Mistake("like-without-hf", "checkpoint export {run} {tmp}/out --like {hf}", 2, "--like", "--to hf"),
    Mistake("override-of-manifest", f"data stats {MANIFEST} seed=1", 2, "seed=1", "name a .yaml file"),
    Mistake("rename", "checkpoint import {tmp} {tmp}/out --rename x", 2, "--rename x", "expected OLD=NEW"),
]
MACHINE = [
    Mistake("cuda", f"train {TINY} engine.device=cuda", 2, "engine.device=cuda", "set engine.device=cpu"),
    Mistake("fp16-on-a-cpu", f"train {TINY} engine.precision=fp16", 2, "engine.precision=fp16", "use fp32, or bf16"),
    Mistake(
        "flash-on-a-cpu", f"train {TINY} engine.attention=flash", 2, "engine.attention=flash", "sdpa works anywhere"
    ),
]
DATA = [
    Mistake(
        "no-document-fits", f"train {TINY} data.packing.max_tokens=2", 2, "data set emoji", "a pack holds 2 tokens"
    ),
    Mistake(
        "field",
        f"train {TINY} 'data.datasets.0.template={{{{kind: caption, field: nam}}}}'",
        2,
        "data set emoji",
        "the sample has",
    ),
    Mistake("long-pack", f"train {TINY} data.packing.max_cost=1", 2, "max_cost", "data set emoji"),
    Mistake(
        "held-out-field",
        f"train {TINY} 'evaluation.sets=[{{{{name: a, manifest: {MANIFEST}, field: nam}}}}]'",
        2,
        "evaluation set a: field 'nam'",
        "the sample has",
    ),
    Mistake(
        "held-out-manifest",
        f"train {TINY} 'evaluation.sets=[{{{{name: a, manifest: gone, field: name}}}}]'",
        2,
        "evaluation set a",
        "gone: no such file",
    ),
    Mistake(
        "unpredicted-token",
        f"train {TINY} model.decoder.vocab_size=1000 'model.decoder.extra_tokens={{{{rows: 1048, predicted: false}}}}'",
        2,
        "model.decoder.extra_tokens.predicted=false",
        "set predicted: true",
    ),
    Mistake("patch-size", f"train {TINY} model.vision.patch_size=5", 2, "data set emoji", "5"),
    Mistake("no-such-manifest", "data verify absent.manifest", 1, "absent.manifest", "mmscale data index"),
    Mistake(
        "ingest-empty-folder",
        "data ingest {tmp}/empty_folder --output {tmp}/out",
        2,
        "empty_folder",
        "give a folder of images and texts",
    ),
    Mistake("not-a-tar", "data index {tmp}/rubbish.tar --manifest {tmp}/x.manifest", 1, "rubbish.tar", "copy it again"),
    Mistake(
        "damaged-shard", "data verify {tmp}/shards/set.manifest", 1, "part-00000.tar key=0001", "data.faults.exclude"
    ),
]
FOLDERS = [
    Mistake(
        "no-weights",
        f"train {TINY} 'stages.0.weights=[{{{{checkpoint: absent}}}}]' run_dir={{tmp}}/new",
        2,
        "stages.0.weights.0.checkpoint=absent",
        "give a run folder",
    ),
    Mistake(
        "hf-as-weights",
        f"train {TINY} 'stages.0.weights=[{{{{checkpoint: {{hf}}}}}}]' run_dir={{tmp}}/new",
        2,
        "stages.0.weights.0.checkpoint=",
        "mmscale checkpoint import {hf}",
    ),
    Mistake(
        "hf-as-teacher",
        f"train {TINY} 'stages.0.distill=[{{{{checkpoint: {{hf}}}}}}]' run_dir={{tmp}}/new",
        2,
        "stages.0.distill.0.checkpoint=",
        "mmscale checkpoint import {hf}",
    ),
    Mistake("hf-as-run", "generate {hf} --prompt x", 1, "{hf}", "mmscale checkpoint import {hf}"),
    Mistake("hf-to-list", "checkpoint list {hf}", 1, "{hf}", "mmscale checkpoint import {hf}"),
    Mistake(
        "no-run", "generate absent --prompt x", 2, "absent: no such file (looked for {cwd}/absent)", "give a run folder"
    ),
    Mistake("no-checkpoints", "checkpoint list {tmp}/empty_folder", 1, "empty_folder", "no checkpoint"),
    Mistake("eval-untrained", "eval configs/quickstart.yaml run_dir={tmp}/new", 1, "{tmp}/new", "mmscale train"),
    Mistake(
        "report-of-nothing",
        "report {tmp}/empty_folder",
        2,
        "empty_folder: not a run folder",
        "give the run_dir of a run",
    ),
    Mistake(
        "damaged-checkpoint",
        "checkpoint verify {tmp}/damaged",
        1,
        "step-00000003 rank-00000.safetensors: has checksum",
        "checkpoint.on_damage=previous",
    ),
    Mistake(
        "truncated-checkpoint",
        f"train {TINY} run_dir={{tmp}}/cut max_steps=5",
        1,
        "step-00000002",
        "checkpoint.on_damage=previous",
    ),
    Mistake(
        "another-model",
        f"config validate {TINY} run_dir={{run}} max_steps=3 model.decoder.tie_embeddings=true",
        1,
        "is a checkpoint of another model",
        "tied parameters",
    ),
    Mistake(
        "another-optimizer",
        f"config validate {TINY} run_dir={{run}} max_steps=3 'stages.0.optimizer={{{{kind: adafactor}}}}'",
        1,
        "state of",
        "restore stages.*.optimizer",
    ),
    Mistake(
        "another-order",
        f"config validate {TINY} run_dir={{run}} max_steps=3 data.packing.look_ahead=7",
        1,
        "changed since: packing",
        "put them back",
    ),
    Mistake(
        "another-seed",
        f"train {TINY} run_dir={{run}} max_steps=2 seed=9",
        2,
        "Different: seed: 1 -> 9",
        "give another run_dir",
    ),
    Mistake(
        "stage-is-gone",
        f"config validate {TINY} run_dir={{run}} max_steps=3 stages.0.name=x",
        1,
        "saved in stage 'pretrain'",
        "put the stage's name and its train list back",
    ),
    Mistake(
        "no-image", "generate {run} --image absent.png", 1, "absent.png: no such file", "looked for {cwd}/absent.png"
    ),
    Mistake("text-as-image", "generate {run} --image README.md", 1, "README.md", "no JPEG, PNG or WebP"),
    Mistake("image-is-cut", "generate {run} --image {tmp}/cut.png", 1, "cut.png", "get it again"),
    Mistake(
        "too-many-images",
        "generate {run} --image {tmp}/good.png --prompt <image><image>",
        2,
        "image number 2",
        "add --image FILE",
    ),
    Mistake("import-nothing", "checkpoint import absent {tmp}/out", 1, "absent", "no such folder"),
    Mistake(
        "import-unknown-family", "checkpoint import {hf} {tmp}/out --from hf", 1, "model_type='nothing'", "only aria"
    ),
    Mistake("export-over-files", "checkpoint export {run} {tmp}/full", 1, "/full", "new folder"),
]
MISTAKES = [*KEYS, *FILES, *VERBS, *MACHINE, *DATA, *FOLDERS]
