"""What cannot be meant is an error that names the key, the value, the place and the fix."""

import pytest

from dist_fair import recipes
from dist_fair.errors import DistFairError

ARGUMENTS = [
    # unknown names
    (["recipe=gdx"], "recipe=gdx: no such recipe: did you mean 'gda'?"),
    (["recipe=erm", "data=dem"], "data=dem: no such data card: did you mean 'demo'?"),
    (["recipe=erm", "detector=resnet5"], "detector=resnet5: no such detector card: did you mean 'resnet50'?"),
    (["recipe=erm", "detector=qqq"], "any timm model: detector.name=NAME"),
    (["recipe=no/such.yaml"], "no/such.yaml cannot be read"),
    ([], "recipe=NAME is missing; known: dag_fdd, "),
    # unknown keys
    (["recipe=erm", "train.stepz=3"], "unknown key train.stepz: did you mean 'train.steps'?"),
    (["recipe=erm", "+train.stepz=3"], "unknown key train.stepz: did you mean 'train.steps'?"),
    (["recipe=erm", "lr=0.1"], "unknown key lr: did you mean optimizer.lr?"),
    (["recipe=erm", "hydra.run.dir=x"], "unknown key hydra.run.dir"),
    (["recipe=erm", "data={trian: [a]}"], "data=NAME or data=path/to/file.yaml"),
    (["recipe=erm", "train={stepz: 3}"], "unknown key train.stepz"),
    (["recipe=erm", "+data.tapes.fake.labl=1"], "unknown key data.tapes.fake.labl"),
    (["recipe=erm", "interventions.cross_entropy.wait=1"], "did you mean 'interventions.cross_entropy.weight'?"),
    (["recipe=erm", "+interventions.cross_entrpy.weight=1"], "no such intervention: did you mean 'cross_entropy'?"),
    # wrong types
    (["recipe=erm", "train.steps=many"], "train.steps=many: expected int or null"),
    (["recipe=erm", "train.steps=1.5"], "train.steps=1.5: expected int or null"),
    (["recipe=erm", "train.batch_size=null"], "train.batch_size=null: expected int"),
    (["recipe=erm", "data.train=a"], "data.train=a: expected [str, ...]"),
    (["recipe=erm", "data.mean=[a,b,c]"], "expected [float, ...]"),
    (["recipe=erm", "data.attributes.gender=female"], "expected [str, ...]"),
    (["recipe=erm", "train=3"], "train=3: expected settings under it: a mapping"),
    (["recipe=erm", "detector.pretrained=3"], "expected bool or str"),
    (["recipe=erm", "+data.tapes.real.share=x"], "data.tapes.real.share=x: expected int"),
    (["recipe=erm", "optimizer.sam=0.05"], "optimizer.sam=0.05: expected settings under it: a mapping"),
    (["recipe=erm", "optimizer.sam.scope=null"], "optimizer.sam.scope=null: expected int or str"),
    (["recipe=erm", "+data.tapes.real=x"], "expected {label, share, where}"),
    (["recipe=erm", "interventions.cross_entropy=3"], "interventions.cross_entropy=3: expected a mapping"),
    (["recipe=erm", "interventions=[cross_entropy]"], "expected NAME: settings, a mapping"),
    # wrong values
    (["recipe=erm", "train.precision=fp16"], "train.precision=fp16 (command line): one of fp32, bf16"),
    (["recipe=erm", "detector.norm=sync"], "one of synced, local, frozen"),
    (["recipe=erm", "train.backend=zero4"], "one of ddp, fsdp, zero1, zero2, zero3"),
    (["recipe=erm", "schedule.name=linear"], "one of constant, cosine, step"),
    (["recipe=erm", "data.bad_samples=skip"], "one of fail, substitute"),
    (["recipe=erm", "wandb.mode=on"], "one of auto, online"),
    (["recipe=erm", "+data.tapes.real.label=2"], "data.tapes.real.label=2 (command line): one of null, 0, 1"),
    (["recipe=erm", "optimizer.lr=nan"], "optimizer.lr=.nan (command line): a finite number"),
    (["recipe=erm", "interventions.cross_entropy.weight=inf"], "a finite number"),
    (["recipe=erm", "interventions.cross_entropy.weight=-1"], "interventions.cross_entropy: weight=-1.0: must not"),
    (["recipe=erm", "optimizer.sam.rho=0"], "optimizer.sam.rho=0.0 (command line): at least 1e-12"),
    (["recipe=erm", "optimizer.sam={rho: 0.05, scope: 0}"], "optimizer.sam.scope=0 (command line): at least 1"),
    (["recipe=erm", "optimizer.sam={rho: 0.05, scope: rank}"],
     "optimizer.sam.scope=rank (command line): global, or a number of samples"),
    (["recipe=erm", "train.batch_size=0"], "train.batch_size=0 (command line): at least 1"),
    (["recipe=erm", "data.augment.flip=1.5"], "between 0 and 1"),
    (["recipe=erm", "data.augment.jpeg=0.5", "data.augment.jpeg_quality=[90,40]"], "two numbers, lowest first"),
    (["recipe=erm", "data.mean=[0.5]"], "three numbers"),
    (["recipe=erm", "data.std=[0.5,0,0.5]"], "data.std=[0.5, 0.0, 0.5] (command line): at least"),
    (["recipe=erm", "data.train=[]"], "data.train=[] (command line) is empty: choose a card with data=NAME"),
    (["recipe=erm", "data.train=[a,a]"], "a folder is listed twice"),
    (["recipe=erm", "out="], "out is empty"),
    (["recipe=erm", "data.root=${oc.env:NO_SUCH_VARIABLE}"], "cannot be resolved"),
    (["recipe=erm", r"out='\${x}'"], "'${' cannot be part of a value"),
    # malformed
    (["recipe=erm", "train.steps"], "key=value, +key=value or ~key is expected"),
    (["recipe=erm", "=3"], "key=value, +key=value or ~key is expected"),
    (["recipe=erm", "data.train=[a"], "key=value, +key=value or ~key is expected"),
    (["recipe=erm", "seed=1,2"], "one value a run"),
    (["recipe=erm", "seed=range(3)"], "one value a run"),
    (["recipe=erm,gda"], "one value a run"),
    (["recipe=erm", "recipe=gda"], "once"),
    (["recipe=[erm]"], "recipe=NAME"),
    (["~recipe"], "recipe=NAME"),
    (["recipe=erm", "detector@data=small"], "@package"),
    # add and remove
    (["recipe=erm", "data.attributes.age=[]"], "to add it: +data.attributes.age=[]"),
    (["recipe=gda", "interventions.channel_decoupling.part=0.1"], "to add it: +interventions.channel_decoupling.part"),
    (["recipe=gda", "~interventions.channel_decoupling"], "this recipe has no interventions.channel_decoupling"),
    (["recipe=erm", "~train.steps"], "cannot be removed; set it: train.steps="),
    (["recipe=erm", "~data"], "data=NAME"),
    # contradictions and settings without effect
    (["recipe=erm", "train.steps=3", "train.epochs=4"], "give one of the two, the other null"),
    (["recipe=erm", "train.steps=null"], "give one of the two, the other null"),
    (["recipe=erm", "train.batch_size=32", "train.accumulate=3"],
     "train.accumulate=3 (command line) does not divide train.batch_size=32"),
    (["recipe=erm", "train.batch_size=32", "train.accumulate=2", "data.lanes=32"], "does not divide"),
    (["recipe=erm", "schedule={name: constant, floor: 0.1}"], "schedule.floor=0.1 (command line) has no effect"),
    (["recipe=erm", "schedule={name: cosine, every: 0.1}"], "schedule.every=0.1 (command line) has no effect"),
    (["recipe=erm", "schedule={name: step, every: 0}"], "above 0"),
    (["recipe=erm", "optimizer={name: adamw, momentum: 0.9}"], "has no effect with optimizer.name=adamw"),
    (["recipe=erm", "optimizer.sam.scope=8"],
     "optimizer.sam.scope=8 (command line) has no effect with optimizer.sam.rho=null (default): set that"),
    (["recipe=erm", "optimizer.sam.adaptive=true"], "optimizer.sam.adaptive=true (command line) has no effect with"),
    (["recipe=erm", "optimizer.sam={rho: 0.05, scope: 8}", "train.accumulate=2", "train.accumulate_exact=true"],
     "train.accumulate_exact=true (command line) has no effect with optimizer.sam.scope=8 (command line)"),
    (["recipe=erm", "train.offload=true"],
     "train.offload=true (command line) has no effect with train.backend=ddp (default)"),
    (["recipe=erm", "train.backend=fsdp", "optimizer.name=lamb"],
     "optimizer.name=lamb (command line): with train.backend=fsdp (command line) an optimizer sees parts of tensors"),
    (["recipe=erm", "train.backend=zero2", "train.precision=fp64"],
     "train.backend=zero2 (command line) keeps weights and moments in fp32"),
    (["recipe=erm", "train.backend=zero1", "optimizer.sam.rho=0.05"],
     "optimizer.sam.rho=0.05 (command line): train.backend=zero1 (command line) hands out gradients to be stepped"),
    (["recipe=erm", "train.backend=fsdp", "optimizer.sam={rho: 0.05, scope: 8}"],
     "optimizer.sam.scope=8 (command line): train.backend=fsdp (command line) has no rank that climbs on its own"),
    (["recipe=erm", "train.backend=fsdp", "train.offload=true", "optimizer.sam.rho=0.05"],
     "train.offload=true (command line): with optimizer.sam.rho=0.05 (command line) the weights move twice a step"),
    (["recipe=erm", "detector.norm=frozen"], "frozen statistics of an untrained detector"),
    (["recipe=erm", "data.augment.jpeg_quality=[10,20]"], "has no effect with data.augment.jpeg=0"),
    (["recipe=erm", "wandb.mode=disabled", "wandb.project=x"], "wandb.project has no effect with wandb.mode=disabled"),
    (["recipe=erm", "+data.tapes.x.where.age=old"], "data.attributes has no 'age'"),
    # code
    (["recipe=erm", "+_target_=os.system"], "remove it"),
    (["recipe=erm", "+optimizer.arguments={_target_: os.system}"], "name no code"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), ARGUMENTS, ids=[" ".join(case[0]) or "nothing" for case in ARGUMENTS]
)
def test_command_line(resolve, arguments, message):
    with pytest.raises(DistFairError) as error:
        resolve(*arguments)
    assert message in str(error.value)


FILES = [
    ("train: {stepz: 3}", "unknown key train.stepz: did you mean 'train.steps'?"),
    ("train: {steps: many}", "train.steps=many: expected int or null"),
    ("train: 3", "train=3: expected settings"),
    ("- 1", "a mapping of settings is expected"),
    ("", "a mapping of settings is expected"),
    ("a: [", "is not plain YAML"),
    ("seed: 1\nseed: 2", "is not plain YAML"),
    ("seed: !!python/object/apply:os.getpid []", "is not plain YAML"),
    ("optimizer: {arguments: {a: [{_target_: os.system}]}}", "optimizer.arguments.a.0._target_: recipes hold settings"),
    ("interventions: [cross_entropy]", "expected NAME: settings, a mapping"),
    ("interventions: {cross_entrpy: {weight: 1}}", "no such intervention: did you mean 'cross_entropy'?"),
    ("interventions: {cross_entropy: {wait: 1}}", "unknown key interventions.cross_entropy.wait"),
    ("interventions: {cross_entropy: 3}", "expected a mapping of settings"),
    ("recipe: erm", "a recipe is named by its file"),
    ("defaults: sfd_gda", "defaults=sfd_gda: a list"),
    ("train: {steps: 3, epochs: 3}", "give one of the two"),
    ("train: {precision: fp16}", "one of fp32, bf16"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_recipe_file(resolve, tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(DistFairError) as error:
        resolve(f"recipe={path}")
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("entry", ["sfd_gdx", "override /detector: no_such", "override /nothing: x"])
def test_defaults_that_are_not_there(resolve, tmp_path, entry):
    path = tmp_path / "own.yaml"
    path.write_text(f"defaults: [sfd_gda, {entry}]\n".replace("[sfd_gda, sfd_gdx]", "[sfd_gdx]"))
    with pytest.raises(DistFairError, match="do not compose"):
        resolve(f"recipe={path}")


def test_unreadable_files(resolve, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DistFairError, match="not plain YAML"):
        resolve(f"recipe={tmp_path / 'binary.yaml'}")
    with pytest.raises(DistFairError, match="cannot be read"):
        resolve(f"recipe={tmp_path}/")


def test_the_command_stops_with_2(capsys):
    assert recipes.guarded(recipes.main, ["show", "gdx"]) == 2
    assert capsys.readouterr().err.startswith("error: recipe=gdx")
