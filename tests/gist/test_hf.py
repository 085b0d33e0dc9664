"""transformers' Trainer around wrapped models: its results, its checkpoints, its errors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import text_models
import torch
import torch.nn.functional as F
from models import METHOD_CONFIGS, eva, timm_vit, transformers_dinov2, transformers_vit
from safetensors.torch import save_file
from torch import nn
from training import in_processes

import gist

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

import gist.hf  # noqa: E402


def hf_peft():
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    names = [n.rpartition(".")[2] for n, _ in transformers_vit().named_modules()]
    if "query" not in names:
        settings["target_modules"] = ["q_proj", "v_proj"]
    return peft.get_peft_model(transformers_vit(), peft.LoraConfig(**settings))


MAKERS = {
    "timm ViT": timm_vit,
    "timm Eva": eva,
    "transformers ViT": transformers_vit,
    "transformers DINOv2": transformers_dinov2,
    "HF PEFT": hf_peft,
}
CASES = [
    ("timm ViT", "adapter"), ("timm ViT", "lora"), ("timm ViT", "vpt"), ("timm Eva", "adapter"),
    ("transformers ViT", "adapter"), ("transformers ViT", "lora"), ("transformers ViT", "vpt"),
    ("transformers DINOv2", "adapter"), ("transformers DINOv2", "lora"),
    ("transformers DINOv2", "vpt"), ("HF PEFT", "none"),
]  # fmt: skip
every_case = pytest.mark.parametrize(("family", "method"), CASES)
some_cases = pytest.mark.parametrize(
    ("family", "method"), [("timm ViT", "adapter"), ("transformers ViT", "lora"), CASES[-1]]
)


def backbone_of(family):
    torch.manual_seed(5)
    return MAKERS[family]()


def model_of(family="timm ViT", method="adapter", **config):
    backbone = backbone_of(family)
    return gist.wrap(backbone, gist.GistConfig(METHOD_CONFIGS[method], **config))


def rows(count, name="pixel_values"):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            name: torch.randn(3, 32, 32, generator=generator),
            "label": -100 if index == 1 else index % 5,
            "file": f"{index}.png",  # a column that is not the model's
        }
        for index in range(count)
    ]


def trainer_of(
    model, folder, *, train=13, evaluate=0, data=rows, callbacks=(), compute_metrics=None,
    processing_class=None, **args,
):  # fmt: skip
    """A Trainer of one epoch with SGD: each step's gradient shows in the weights."""
    settings = {
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
        "save_strategy": "no", "num_train_epochs": 1, "per_device_train_batch_size": 8,
        "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(settings | args))
    return transformers.Trainer(
        model if not isinstance(model, gist.GistModel) else gist.hf.ForTrainer(model),
        arguments,
        train_dataset=data(train),
        eval_dataset=data(evaluate) if evaluate else None,
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
        processing_class=processing_class,
    )


def without_dropout(model):
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def trained(family, method, folder, **args):
    """The parameters after a training without random draws, and those before it."""
    model = without_dropout(model_of(family, method, token_dropout=0.0))
    before = {name: value.clone() for name, value in model.trainable_state_dict().items()}
    trainer_of(model, folder, **args).train()
    return model.trainable_state_dict(), before


def correct(prediction):
    assert prediction.predictions.shape == (13, 5)
    return {"correct": int((prediction.predictions.argmax(1) == prediction.label_ids).sum())}


@every_case
def test_accumulated_batches_train_as_a_whole_one(family, method, tmp_path):
    # The second step has 4 + 1 rows, and a row of the first is ignored: the mean of means differs.
    whole, before = trained(family, method, tmp_path)
    parts, _ = trained(
        family, method, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert all(not torch.equal(whole[name], before[name]) for name in whole if "head" in name)
    assert sum(not torch.equal(whole[name], before[name]) for name in whole) >= 3
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6)


@every_case
def test_evaluation_has_the_class_tokens_logits_and_loss(family, method, tmp_path):
    model = model_of(family, method)
    trainer = trainer_of(
        model, tmp_path, evaluate=13, compute_metrics=correct, per_device_eval_batch_size=16
    )
    found = trainer.evaluate()
    data = rows(13)
    labels = torch.tensor([row["label"] for row in data])
    with torch.no_grad():
        logits = model.eval()(torch.stack([row["pixel_values"] for row in data]))
    assert found["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["eval_correct"] == (logits.argmax(1) == labels).sum()
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in data]
    torch.testing.assert_close(torch.tensor(trainer.predict(unlabelled).predictions), logits)


def resumable(family, method, folder, **args):
    return trainer_of(
        model_of(family, method), folder, optim="adamw_torch", learning_rate=1e-2,
        save_strategy="epoch", num_train_epochs=3, **args,
    )  # fmt: skip


@some_cases
def test_a_resumed_training_ends_with_the_same_bits(family, method, tmp_path):
    whole = resumable(family, method, tmp_path, callbacks=[gist.hf.SaveAdapter()])
    whole.train()
    resumed = resumable(family, method, tmp_path)
    for value in resumed.model.model.trainable_state_dict().values():
        value.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = whole.model.model.state_dict()
    assert whole.state.global_step == resumed.state.global_step == 6
    for name, value in resumed.model.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@some_cases
def test_a_checkpoint_holds_the_adapter_alone(family, method, tmp_path):
    trainer = resumable(family, method, tmp_path, callbacks=[gist.hf.SaveAdapter(classes=["a"])])
    trainer.train()
    model, folder = trainer.model.model.eval(), tmp_path / "checkpoint-6"
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert frozen > 10 * max(file.stat().st_size for file in folder.glob("*.safetensors"))
    names = {f"model.{name}" for name in model.trainable_state_dict()}
    assert trainer.model.state_dict().keys() == names | {"_extra_state"}
    loaded = gist.load(backbone_of(family), folder)
    pixels = torch.stack([row["pixel_values"] for row in rows(3)])
    assert torch.equal(loaded(pixels), model(pixels))
    assert json.loads((folder / "config.json").read_text())["classes"] == ["a"]
    trainer.model.save_pretrained(tmp_path / "own")
    again = gist.hf.ForTrainer.from_pretrained(tmp_path / "own", backbone_of(family))
    assert torch.equal(again(pixels).logits, model(pixels))


@some_cases
def test_what_trainer_saves_is_read_onto_a_fresh_backbone(family, method, tmp_path):
    trainer = trainer_of(model_of(family, method), tmp_path, save_strategy="epoch")
    trainer.train()
    trainer.save_model(str(tmp_path / "own"))
    trainer.create_model_card()  # as push_to_hub does
    model, pixels = trainer.model.eval(), torch.stack([row["pixel_values"] for row in rows(3)])
    for folder in (tmp_path / "own", tmp_path / "checkpoint-2"):
        assert not (folder / "adapter.safetensors").exists()
        again = gist.hf.ForTrainer.from_pretrained(folder, backbone_of(family))
        assert not again.training
        assert again.model.config == model.model.config
        assert torch.equal(again(pixels).logits, model(pixels).logits)
        assert again.state_dict().keys() == model.state_dict().keys()


def test_another_backbone_is_refused_unless_meant(tmp_path):
    trainer_of(model_of(), tmp_path).save_model()
    other = backbone_of("timm ViT")
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
    load = gist.hf.ForTrainer.from_pretrained
    with pytest.raises(ValueError, match="backbone does not match"):
        load(tmp_path, other)
    assert load(tmp_path, other, check_weights=False).model.backbone is other


def test_a_trained_loss_is_saved_and_read_with_the_model(tmp_path):
    class Scaled(gist.GistLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output, target):
            return self.scale * super().forward(output, target)

    trainer = trainer_of(gist.hf.ForTrainer(model_of(), Scaled()), tmp_path)
    trainer.train()
    trainer.save_model()
    scale = trainer.model.loss.scale
    load = gist.hf.ForTrainer.from_pretrained
    assert scale != 1
    assert torch.equal(load(tmp_path, backbone_of("timm ViT"), Scaled()).loss.scale, scale)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "scale"'):
        load(tmp_path, backbone_of("timm ViT"))


def test_a_folder_of_something_else_is_named(tmp_path):
    load = gist.hf.ForTrainer.from_pretrained
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(tmp_path, backbone_of("timm ViT"))
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is no checkpoint of gist.hf.ForTr"):
        load(tmp_path, backbone_of("timm ViT"))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    scores = iter((0.2, 0.9, 0.5))
    trainer = resumable(
        "timm ViT", "adapter", tmp_path, evaluate=3, callbacks=[gist.hf.SaveAdapter()],
        compute_metrics=lambda _: {"score": next(scores)}, metric_for_best_model="score",
        load_best_model_at_end=True, eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    found = trainer.model.model.trainable_state_dict()
    best, last = (
        gist.load(backbone_of("timm ViT"), tmp_path / f"checkpoint-{step}").trainable_state_dict()
        for step in (4, 6)
    )
    assert all(torch.equal(value, best[name]) for name, value in found.items())
    assert any(not torch.equal(value, last[name]) for name, value in found.items())


def test_a_checkpoint_of_another_backbone_is_refused_before_it_is_loaded(tmp_path):
    saved = gist.hf.ForTrainer(model_of()).state_dict()
    other = model_of()
    with torch.no_grad():
        other.backbone.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
        other.token.weight.zero_()
    with pytest.raises(ValueError, match="backbone does not match"):
        gist.hf.ForTrainer(other).load_state_dict(saved, strict=False)
    assert not other.token.weight.any()
    same = gist.hf.ForTrainer(model_of())
    assert tuple(same.load_state_dict(saved)) == ([], [])
    lacking = {n: v for n, v in saved.items() if "token" not in n}
    assert same.load_state_dict(lacking, strict=False).missing_keys == ["model.token.weight"]


def test_what_is_trained_beside_the_method_is_in_the_checkpoint():
    model = model_of()
    model.backbone.norm.requires_grad_(True)
    model.token.requires_grad_(False)
    loss = nn.Module()
    loss.scale = nn.Parameter(torch.ones(()))
    saved = gist.hf.ForTrainer(model, loss).state_dict()
    assert {"model.backbone.norm.weight", "model.token.weight", "loss.scale"} <= saved.keys()
    assert "model.backbone.cls_token" not in saved


@pytest.mark.parametrize("family", ["timm ViT", "timm Eva", "transformers ViT", "HF PEFT"])
def test_checkpointed_activations_train_the_same(family, tmp_path):
    method = "none" if family == "HF PEFT" else "adapter"
    name = "activation_checkpointing"
    if not hasattr(transformers.PreTrainedModel, f"{name}_enable"):
        name = "gradient_checkpointing"
    results, calls = [], []
    for checkpointed in (False, True):
        model = without_dropout(model_of(family, method, token_dropout=0.0))
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        norm = next(m for m in model.family.blocks[0].modules() if isinstance(m, nn.LayerNorm))
        norm.register_forward_pre_hook(count)
        trainer_of(model, tmp_path, **{name: checkpointed}).train()
        results.append(model.trainable_state_dict())
    assert calls == [2, 4]  # of two steps
    for parameter, value in results[0].items():
        torch.testing.assert_close(results[1][parameter], value, rtol=1e-4, atol=1e-6)


def test_checkpointing_is_on_and_refuses_what_timm_lacks():
    model = model_of()
    given = gist.hf.ForTrainer(model)
    given.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.grad_checkpointing
    with pytest.raises(ValueError, match="remove {'use_reentrant': True}"):
        given.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers=2"):
        given.activation_checkpointing_enable(every_n_layers=2)


def test_bf16_autocast_trains(tmp_path):
    model = model_of()
    trainer = trainer_of(model, tmp_path, bf16=True, evaluate=13, learning_rate=1e-3)
    before = trainer.evaluate()["eval_loss"]
    token = model.token.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.token.weight, token)
    exact = trainer_of(model_of(), tmp_path, evaluate=13).evaluate()["eval_loss"]
    assert before == pytest.approx(exact, rel=1e-2)
    assert before != exact


def in_two_processes(folder: Path) -> None:
    model = model_of(token_dropout=0.0)
    trainer_of(
        model, folder, train=16, per_device_train_batch_size=4, save_strategy="epoch",
        ddp_backend="gloo", callbacks=[gist.hf.SaveAdapter()],
    ).train()  # fmt: skip
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    assert in_processes(in_two_processes, tmp_path / "two", count=2) == [0, 0]
    model = model_of(token_dropout=0.0)
    trainer_of(model, tmp_path / "one", train=16).train()
    found = gist.load(backbone_of("timm ViT"), tmp_path / "two" / "checkpoint-2")
    for name, value in found.trainable_state_dict().items():
        torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["timm ViT", "transformers ViT"])
def test_config_is_readable_and_writable_and_not_the_backbones(family, tmp_path):
    model = model_of(family)
    if family == "transformers ViT":
        model.backbone.config.id2label = {i: f"class {i}" for i in range(5)}
    own = copy.deepcopy(getattr(model.backbone, "config", None))
    trainer = trainer_of(model, tmp_path)
    described = json.loads(trainer.model.config.to_json_string())
    assert gist.GistConfig.from_dict(described["gist"]) == model.config
    assert trainer.model.config.num_labels == 5
    assert trainer.model.config.hidden_size == 48
    if own is not None:
        assert model.backbone.config.to_dict() == own.to_dict()
        assert trainer.model.config.id2label[1] == "class 1"


def test_a_loss_is_its_part_of_the_steps_mean():
    model = gist.hf.ForTrainer(model_of(token_dropout=0.0))
    pixels, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, -100, 4])
    alone = model(pixels, labels).loss
    assert torch.equal(model(pixels, labels).logits, model.model(pixels).cls_logits)
    for total in (8, torch.tensor(8), torch.tensor([[8]])):  # DataParallel's is the last
        torch.testing.assert_close(model(pixels, labels, None, total).loss, alone * 2 / 8)


def test_images_is_another_name_of_pixel_values(tmp_path):
    trainer = trainer_of(model_of(), tmp_path)
    expected = trainer.predict(rows(3)).predictions
    assert (trainer.predict(rows(3, "images")).predictions == expected).all()
    with pytest.raises(ValueError, match="pixel_values, or as images"):
        trainer.predict(rows(3, "picture"))


texts_of = pytest.mark.parametrize("kind", ["Bert", "Llama"])


def text_model(kind):
    return gist.wrap(text_models.made(kind), gist.GistConfig(token_dropout=0.0))


def texts(count):
    return [
        {"input_ids": list(range(2, 4 + index)), "label": index % 5, "text": "a column of words"}
        for index in range(count)
    ]


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, **{f"word {number}": number for number in range(2, 20)}}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="[PAD]", unk_token="[UNK]"
    )


def of_text(kind, folder, **args):
    model = text_model(kind)
    return trainer_of(model, folder, data=texts, processing_class=tokenizer(), **args)


@texts_of
def test_padded_texts_train_in_parts_as_whole(kind, tmp_path):
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    before = text_model(kind).trainable_state_dict()
    found = []
    for args in ({}, parts):
        trainer = of_text(kind, tmp_path, **args)
        trainer.train()
        found.append(trainer.model.model.trainable_state_dict())
    whole, parts = found
    assert not torch.equal(whole["token.weight"], before["token.weight"])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6)


@texts_of
def test_texts_are_evaluated_and_read_again(kind, tmp_path):
    trainer = of_text(kind, tmp_path, evaluate=13, compute_metrics=correct)
    found = trainer.evaluate()
    batch = trainer.data_collator([{"input_ids": row["input_ids"]} for row in texts(13)])
    labels = torch.tensor([row["label"] for row in texts(13)])
    model = trainer.model.eval()
    output = model(**batch, labels=labels)
    assert isinstance(output, SequenceClassifierOutput)
    assert found["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert found["eval_correct"] == (output.logits.argmax(1) == labels).sum()
    trainer.save_model()
    again = gist.hf.ForTrainer.from_pretrained(tmp_path, text_models.made(kind))
    assert torch.equal(again(**batch).logits, output.logits)


def test_a_text_backbone_gets_what_was_given():
    model = gist.hf.ForTrainer(text_model("Bert")).eval()
    assert model.main_input_name == "input_ids"
    ids = torch.tensor([[2, 3, 4]])
    given = {"input_ids": ids}
    for name, value in {
        "attention_mask": [[1, 1, 0]], "token_type_ids": [[0, 1, 1]], "position_ids": [[4, 3, 2]],
    }.items():  # fmt: skip
        before, given[name] = model(**given).logits, torch.tensor(value)
        assert not torch.equal(model(**given).logits, before)
        assert torch.equal(model(**given).logits, model.model(**given))
    with pytest.raises(ValueError, match=r"text, as input_ids; remove pixel_values from"):
        model(torch.randn(1, 3, 32, 32), **given)
    with pytest.raises(ValueError, match="give the words as input_ids"):
        model(attention_mask=torch.ones_like(ids))


def test_an_image_backbone_refuses_words():
    model, ids = gist.hf.ForTrainer(model_of()).eval(), torch.tensor([[2, 3]])
    assert model.main_input_name == "pixel_values"
    with pytest.raises(ValueError, match=r"images, as pixel_values; remove input_ids, attention_m"):
        model(torch.randn(1, 3, 32, 32), input_ids=ids, attention_mask=ids)


def test_a_model_without_its_loss_is_refused_with_what_to_write(tmp_path):
    with pytest.raises(
        AttributeError, match=r"Trainer\(model=gist.hf.ForTrainer\(model, gist.GistLoss"
    ):
        transformers.Trainer(
            model_of(), transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        )


def test_a_loss_that_would_pass_the_gist_token_by_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"use ForTrainer\(model, loss="):
        trainer_of(model_of(), tmp_path, label_smoothing_factor=0.1).train()


def test_what_for_trainer_does_not_take_is_refused():
    with pytest.raises(TypeError, match=r"model must be what gist.wrap returned; it is a Vision"):
        gist.hf.ForTrainer(timm_vit())
    with pytest.raises(TypeError, match="loss must be called with output and labels; it is 'ce'"):
        gist.hf.ForTrainer(model_of(), "ce")
    with pytest.raises(ValueError, match="leave ignore_index at -100"):
        gist.hf.ForTrainer(model_of(), gist.GistLoss(ignore_index=0))


def test_save_adapter_refuses_before_training(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(TypeError, match=r"SaveAdapter needs Trainer\(model=gist.hf.ForTrainer"):
        transformers.Trainer(transformers_vit(), args, callbacks=[gist.hf.SaveAdapter()])
    model = model_of()
    model.backbone.added = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"added after gist.wrap: backbone.added"):
        trainer_of(model, tmp_path, callbacks=[gist.hf.SaveAdapter()]).train()


def test_a_searchs_checkpoints_are_left_as_they_are(tmp_path):
    args = SimpleNamespace(should_save=True, output_dir=str(tmp_path))
    given = {"model": gist.hf.ForTrainer(model_of())}
    for searching in (True, False):
        assert not any(tmp_path.iterdir())
        state = SimpleNamespace(is_hyper_param_search=searching, global_step=1)
        gist.hf.SaveAdapter().on_save(args, state, None, **given)
    assert (tmp_path / "checkpoint-1" / "adapter.safetensors").is_file()


def test_gist_needs_no_transformers_and_gist_hf_names_the_extra():
    code = (
        "import sys, gist; assert 'transformers' not in sys.modules; "
        "sys.modules['transformers'] = None; import gist.hf"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert said.splitlines()[-1] == (
        "ImportError: gist.hf needs transformers 5 or newer: pip install 'gist-kernels[hf]'"
    )
