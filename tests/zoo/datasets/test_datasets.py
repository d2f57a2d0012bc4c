"""Data sets in the published formats: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import dataset_files
import pytest
import torch

import zoo
from madtp.errors import ConfigError, DataError
from zoo.datasets import CaptionedImage, DataEntry, PairStatement, Question, answer_list, one_caption_each
from zoo.scenes import SceneDataset


def test_the_corpus_own_nlvr2_names_its_images_by_the_identifier(tmp_path: Path) -> None:
    dataset_files.nlvr2_lines(tmp_path)
    data = zoo.data("nlvr2", tmp_path, "val")
    assert data.records == (
        PairStatement("dev-0-0-1", ("dev/dev-0-0-img0.png", "dev/dev-0-0-img1.png"), "Two dogs.", 1),
        PairStatement("dev-1-0-1", ("dev/dev-1-0-img0.png", "dev/dev-1-0-img1.png"), "No dog.", 0),
    )
    images = data[1].images
    assert images.shape == (2, 3, 8, 12)
    assert images.dtype == torch.uint8
    assert images[:, :, 0, 0].tolist() == [[10, 0, 0], [0, 10, 0]]


def test_nlvr2_keeps_training_images_in_directories(tmp_path: Path) -> None:
    line = {"identifier": "train-10171-0-0", "directory": 63, "sentence": "An owl.", "label": "False"}
    path = tmp_path / "train.json"
    path.write_text(json.dumps(line) + "\n")
    dataset_files.write_image(tmp_path / "images/train/63/train-10171-0-img0.png")
    dataset_files.write_image(tmp_path / "images/train/63/train-10171-0-img1.png")
    data = zoo.data("nlvr2", tmp_path, "train")
    assert data.records[0].images[1] == "train/63/train-10171-0-img1.png"
    assert len(data[0].images) == 2


def test_nlvr2_as_blip_lists_it(tmp_path: Path) -> None:
    dataset_files.nlvr2_list(tmp_path)
    data = zoo.data("nlvr2", tmp_path, "train", limit=2)
    assert [record.label for record in data.records] == [1, 0]
    assert data.records[1].statement == "There are 1 dogs."
    assert data[0].images.shape == (2, 3, 8, 12)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_as_blip_lists_it_is_an_image_with_all_its_captions(tmp_path: Path, split: str) -> None:
    dataset_files.coco_list(tmp_path, split)
    data = zoo.data("coco", tmp_path, split)
    assert [len(record.captions) for record in data.records] == [5, 5, 5]
    assert data.records[1].id == ("coco_522418" if split == "train" else "COCO_val2014_000000522418")
    assert data.records[1].captions[4] == "A dog number 1, seen 4 times."
    assert data[2].images.shape == (1, 3, 8, 12)


def test_a_sample_for_every_caption(tmp_path: Path) -> None:
    dataset_files.coco_list(tmp_path, "train")
    data = one_caption_each(zoo.data("coco", tmp_path, "train"))
    assert len(data) == 15
    assert data.records[7] == CaptionedImage(
        "coco_522418#2", ("val2014/COCO_val2014_000000522418.jpg",), ("A dog number 1, seen 2 times.",)
    )
    assert data[7].images.shape == (1, 3, 8, 12)


def test_karpathys_file_holds_all_splits_and_restval_is_for_training(tmp_path: Path) -> None:
    dataset_files.karpathy(tmp_path)
    train = zoo.data("coco", tmp_path, "train")
    assert [record.captions[0] for record in train.records] == ["A dog, train.", "A dog, restval."]
    (test,) = zoo.data("coco", tmp_path, "test").records
    assert test.id == "391898"
    assert test.images == ("val2014/coco-3.jpg",)


@pytest.mark.parametrize("write", [dataset_files.flickr_list, lambda root: dataset_files.karpathy(root, "flickr30k")])
def test_flickr_in_both_formats(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write(tmp_path)
    data = zoo.data("flickr30k", tmp_path, "test")
    assert len(data[0].record.captions) > 1
    assert data[0].images.shape == (1, 3, 8, 12)


def test_vqa_as_blip_lists_it(tmp_path: Path) -> None:
    dataset_files.vqa_list(tmp_path, "val")
    (record,) = zoo.data("vqav2", tmp_path, "val").records
    assert record.weighted_answers() == pytest.approx({"yes": 0.7, "no": 0.3})
    assert record.id == "262144000"


def test_answers_of_vqas_test_are_secret(tmp_path: Path) -> None:
    dataset_files.vqa_list(tmp_path, "test")
    data = zoo.data("vqav2", tmp_path, "test")
    assert data.records[0].answers == ()
    assert len(data[0].images) == 1


def test_vqa_in_the_official_pair_of_files(tmp_path: Path) -> None:
    dataset_files.vqa_official(tmp_path)
    data = zoo.data("vqav2", tmp_path, "val")
    image = "val2014/COCO_val2014_000000262148.jpg"
    assert data.records[1] == Question(
        "262148001", (image,), "How many are there?", ("4",) * 7 + ("four",) * 3, kind="number"
    )
    assert data[0].images.shape == (1, 3, 8, 12)


def test_visual_genome_counts_a_fifth(tmp_path: Path) -> None:
    dataset_files.visual_genome(tmp_path)
    data = zoo.data("visual_genome", tmp_path, "train")
    assert data.records[0].weighted_answers() == {"a cup": 0.2}
    assert len(data[0].images) == 1


def test_a_list_of_answers(tmp_path: Path) -> None:
    assert answer_list(dataset_files.write_json(tmp_path / "answer_list.json", ["yes", "no"])) == ("yes", "no")
    for content, message in (
        (["yes", "yes"], "twice"),
        ({"yes": 1}, "not a list of answers"),
        ([], "not a list of answers"),
    ):
        with pytest.raises(DataError, match=message):
            answer_list(dataset_files.write_json(tmp_path / "odd.json", content))


def test_scenes_are_those_of_the_scene_data_set() -> None:
    data, known = zoo.data("scenes", split="val", limit=5, seed=3), SceneDataset("val", 5, seed=3)
    for index, item in enumerate(known[i] for i in range(5)):
        record = data.records[index]
        assert (record.id, record.statement, record.label, record.kind) == (
            item["id"],
            item["statement"],
            item["label"],
            item["kind"],
        )
        assert torch.equal(data[index].images, item["images"])


def test_names_are_listed_and_suggested() -> None:
    assert set(zoo.list_data()) >= {"coco", "flickr30k", "nlvr2", "scenes", "visual_genome", "vqav2"}
    assert zoo.list_data("v*") == ["visual_genome", "vqav2"]
    with pytest.raises(DataError, match="Did you mean 'nlvr2'"):
        zoo.data("nlvr", ".")


def test_a_name_is_given_once() -> None:
    entry = DataEntry("coco", lambda request: ([], lambda name: None), "", ("captioning",), ("test",))
    with pytest.raises(ConfigError, match="registered already"):
        zoo.register_data(entry)


def test_a_wrong_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nlvr2 has no split 'dev'; choose one of train, val, test"):
        zoo.data("nlvr2", tmp_path, "dev")


def test_a_file_of_another_split_is_refused(tmp_path: Path) -> None:
    path = dataset_files.nlvr2_lines(tmp_path)
    with pytest.raises(DataError, match="'dev-0-0-1', which does not belong to the split 'train'"):
        zoo.data("nlvr2", tmp_path, "train", annotations=path)
    dataset_files.karpathy(tmp_path)
    path = tmp_path / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:2]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="no images of the split 'test'; it has restval, train"):
        zoo.data("coco", tmp_path, "test")
    questions, _ = dataset_files.vqa_official(tmp_path)
    with pytest.raises(DataError, match="'data_subtype' is 'val2014'; it has to be one of train2014"):
        zoo.data("vqav2", tmp_path, "train", annotations=questions)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds none of nlvr_train\.json, train\.json"):
        zoo.data("nlvr2", tmp_path, "train")
    with pytest.raises(DataError, match="is not a folder"):
        zoo.data("nlvr2", tmp_path / "none", "train")
    with pytest.raises(DataError, match="lies in files"):
        zoo.data("nlvr2")
    questions, annotations = dataset_files.vqa_official(tmp_path)
    annotations.unlink()
    with pytest.raises(DataError, match=r"v2_mscoco_val2014_annotations\.json is not there"):
        zoo.data("vqav2", tmp_path, "val", annotations=questions)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _, annotations = dataset_files.vqa_official(tmp_path)
    content = json.loads(annotations.read_text())
    content["annotations"].pop()
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match="question 262148001 is not among the annotations"):
        zoo.data("vqav2", tmp_path, "val")


def test_missing_and_damaged_images_are_errors_not_gaps(tmp_path: Path) -> None:
    dataset_files.nlvr2_lines(tmp_path)
    data = zoo.data("nlvr2", tmp_path, "val")
    image = tmp_path / "dev" / "dev-0-0-img1.png"
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(DataError, match=r"dev-0-0-img1\.png is damaged or not an image"):
        data[0]
    image.unlink()
    with pytest.raises(DataError, match=r"there is no image .*dev-0-0-img1\.png"):
        data[0]
    assert len(data[1].images) == 2


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_images_stay_inside_their_folder(tmp_path: Path, name: str) -> None:
    dataset_files.write_image(tmp_path / "secret.png")
    entry = {"sentence": "A dog.", "label": "True", "images": [name, name]}
    root = dataset_files.write_json(tmp_path / "root" / "nlvr_test.json", [entry]).parent
    with pytest.raises(DataError, match="lies outside"):
        zoo.data("nlvr2", root, "test")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[{", "neither JSON"),
        ('{"a": 1}\n{"a"', "line 2"),
        ("3", "holds int, not a list"),
        ("[3]", "entry 0, holds int, not an object"),
        ("[]", "holds no samples"),
        ('[{"images": ["a", "b"], "label": "True"}]', "has no field 'sentence'"),
        ('[{"images": ["a", "b"], "label": "true", "sentence": "A."}]', "'label' is 'true'; it has to be one of"),
        ('[{"images": ["a"], "label": "True", "sentence": "A."}]', "names 1 images"),
        ('[{"images": ["a", 2], "label": "True", "sentence": "A."}]', r"'images\[1\]' is 2"),
        ('[{"images": ["a", "b"], "label": "True", "sentence": " "}]', "'sentence' is ' '"),
        ('{"identifier": "test1-0-0", "label": "True", "sentence": "A."}', "three numbers"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "nlvr_test.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        zoo.data("nlvr2", tmp_path, "test")


def test_a_sample_twice_is_refused(tmp_path: Path) -> None:
    path = dataset_files.nlvr2_lines(tmp_path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match=r"dev\.json, line 3 is 'dev-0-0-1' once more, after .*dev\.json, line 1"):
        zoo.data("nlvr2", tmp_path, "val")


def test_an_image_under_two_numbers_is_refused(tmp_path: Path) -> None:
    path = dataset_files.coco_list(tmp_path, "train")
    content = json.loads(path.read_text())
    content[1]["image_id"] = "coco_1"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="is 'coco_1' here and 'coco_391895' before"):
        zoo.data("coco", tmp_path, "train")


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="made by rule"):
        zoo.data("scenes", tmp_path)
    with pytest.raises(DataError, match="limit is 0"):
        zoo.data("scenes", limit=0)
    dataset_files.nlvr2_lines(tmp_path)
    with pytest.raises(DataError, match="one edition"):
        zoo.data("nlvr2", tmp_path, "val", seed=1)


ANNOTATIONS: dict[str, tuple[str, str, object, str]] = {
    "blank caption": (
        "coco",
        "coco_karpathy_test.json",
        [{"image": "a.jpg", "caption": [" "]}],
        r"entry 0: 'caption\[0\]' is ' '",
    ),
    "blank caption in training": (
        "coco",
        "coco_karpathy_train.json",
        [{"image": "a", "caption": "\n"}],
        "'caption' is",
    ),
    "half a character": (
        "coco",
        "coco_karpathy_test.json",
        [{"image": "a", "caption": ["a \ud800"]}],
        "it has to be some text",
    ),
    "no captions": (
        "coco",
        "coco_karpathy_test.json",
        [{"image": "a", "caption": []}],
        "it has to be text or a list of texts",
    ),
    "an image twice": (
        "coco",
        "coco_karpathy_test.json",
        [{"image": "a", "caption": ["x"]}, {"image": "b", "caption": ["y"]}, {"image": "a", "caption": ["z"]}],
        "entry 2 lists captions of a once more, after .*entry 0",
    ),
    "an image in both ways": (
        "coco",
        "coco_karpathy_test.json",
        [{"image": "a", "caption": "x"}, {"image": "a", "caption": ["z"]}],
        "entry 1 lists captions of a once more",
    ),
    "a number twice": (
        "coco",
        "dataset_coco.json",
        {"images": [{"split": "test", "filename": n, "cocoid": 3, "sentences": [{"raw": "x"}]} for n in "ab"]},
        "entry 1 is '3' once more, after .*entry 0",
    ),
    "blank answer": (
        "vqav2",
        "vqa_test.json",
        [{"question_id": 1, "question": " ", "image": "a"}],
        "entry 0: 'question' is ' '",
    ),
    "a question twice": (
        "vqav2",
        "vqa_test.json",
        [{"question_id": n, "question": "x", "image": "a"} for n in (1, 2, 1)],
        "entry 2 is '1' once more, after .*entry 0",
    ),
    "huge image": (
        "vqav2",
        "v2_OpenEnded_mscoco_test2015_questions.json",
        {"questions": [{"question_id": 1, "question": "x", "image_id": "9" * 5000}]},
        "images of COCO have numbers",
    ),
    "odd digits": (
        "vqav2",
        "v2_OpenEnded_mscoco_test2015_questions.json",
        {"questions": [{"question_id": 1, "question": "x", "image_id": "²"}]},
        "images of COCO have numbers",
    ),
}


@pytest.mark.parametrize("fault", ANNOTATIONS)
def test_annotations_that_say_nothing_or_say_it_twice_are_named(tmp_path: Path, fault: str) -> None:
    name, file, content, words = ANNOTATIONS[fault]
    dataset_files.write_json(tmp_path / file, content)
    split = "train" if "train" in file else "test"
    with pytest.raises(DataError, match=words) as caught:
        zoo.data(name, tmp_path, split)
    assert file in str(caught.value)


@pytest.mark.parametrize("blank", ["", "  ", None, 3])
def test_blank_answers_are_named(tmp_path: Path, blank: object) -> None:
    entry = {"question_id": 1, "question": "x", "image": "a", "answer": ["yes", blank]}
    dataset_files.write_json(tmp_path / "vqa_val.json", [entry])
    with pytest.raises(DataError, match=r"vqa_val\.json, entry 0: 'answer\[1\]' is .*it has to be some text"):
        zoo.data("vqav2", tmp_path, "val")
    path = dataset_files.write_json(tmp_path / "answer_list.json", ["yes", blank])
    with pytest.raises(DataError, match=r"answer_list\.json: 'answers\[1\]' is .*it has to be some text"):
        answer_list(path)


def test_a_question_that_is_answered_twice_is_refused(tmp_path: Path) -> None:
    _, annotations = dataset_files.vqa_official(tmp_path)
    content = json.loads(annotations.read_text())
    content["annotations"].append(content["annotations"][0])
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"entry 2 answers question 262148000 once more, after .*entry 0"):
        zoo.data("vqav2", tmp_path, "val")


def test_a_caption_that_two_people_wrote_is_kept_twice(tmp_path: Path) -> None:
    entries = [{"image": "a.jpg", "caption": "A dog.", "image_id": "coco_1"}] * 2
    dataset_files.write_json(tmp_path / "coco_karpathy_train.json", entries)
    (record,) = zoo.data("coco", tmp_path, "train").records
    assert record.captions == ("A dog.", "A dog.")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"images":' * 100_000, '{"a": 1}\n' + "[" * 100_000]
)
def test_deep_annotations_are_refused(tmp_path: Path, text: str) -> None:
    for name in ("coco_karpathy_test.json", "vqa_test.json", "nlvr_test.json", "vg_qa.json"):
        (tmp_path / name).write_text(text)
    for data in ("coco", "vqav2", "nlvr2"):
        with pytest.raises(DataError, match=r"test\.json"):
            zoo.data(data, tmp_path, "test")
    with pytest.raises(DataError, match=r"vg_qa\.json"):
        zoo.data("visual_genome", tmp_path, "train")


def test_values_that_nest_deeply_in_a_field_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vqa_test.json").write_text(
        '[{"question_id": 1, "image": "a", "question": ' + "[" * 900 + "]" * 900 + "}]"
    )
    with pytest.raises(DataError, match="'question' is a list of 1; it has to be some text"):
        zoo.data("vqav2", tmp_path, "test")


def test_annotations_that_are_not_utf_8_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "nlvr_test.json").write_bytes(b'{"identifier": "test1-0-0-0"}\n{"sentence": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"nlvr_test\.json cannot be read \(line 2 is not UTF-8"):
        zoo.data("nlvr2", tmp_path, "test")


def test_annotations_of_a_size_that_no_data_set_has_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "nlvr_test.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="takes 1048576 MiB where 4096 MiB at most fit"):
        zoo.data("nlvr2", tmp_path, "test")
