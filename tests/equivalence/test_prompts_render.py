"""The prompt contract: order of parts, no trace of what is empty, versions, size."""

import subprocess
import sys

import pytest

from recollect.backbones.protocol import Message
from recollect.errors import ConfigError, UnknownName
from recollect.prompts import Renderer, fence_of, template_version, template_versions
from recollect.prompts.render import FIELD_CHARACTERS, SITES
from recollect.prompts.schemas import SCHEMAS, complaint, ranking_schema

RENDERER = Renderer(("<|im_start|>", "<|im_end|>"), 7)
PAIR = {"title_a": "Dune", "memory_a": "desert planet", "title_b": "Emma", "memory_b": "manners"}
TASTE = {"private": "likes space", "fused": "likes long sagas", "groups": [("epics", ["Hyperion", "Foundation"])]}


def user_turn(site, renderer=RENDERER, **values):
    return renderer.render(site, **values)[-1].content


def test_parts_come_static_first_then_memory_then_candidates_then_the_question():
    system, user = RENDERER.render("choice", domain="Books", **TASTE, **PAIR)
    assert (system.role, user.role) == ("system", "user")
    landmarks = [f"<{RENDERER.fence}>", "Books", "likes space", "likes long sagas", "Hyperion", "A. Dune", "B. Emma"]
    places = [user.content.index(mark) for mark in [*landmarks, f"</{RENDERER.fence}>", "Answer with one letter."]]
    assert places == sorted(places)
    assert user.content.endswith("Answer with one letter.")


def test_prompts_about_the_same_user_share_everything_before_the_candidates():
    first = user_turn("choice", domain="Books", **TASTE, **PAIR)
    second = user_turn("choice", domain="Books", **TASTE, **{**PAIR, "title_a": "Ulysses", "memory_a": ""})
    shared = first.index("A. Dune")
    assert first[:shared] == second[:shared]


@pytest.mark.parametrize("site", sorted(set(SITES) - {"reask"}))
def test_the_system_turn_is_constant(site):
    def filled(text):
        values = dict.fromkeys(SITES[site].numbers, 9)
        for field in (*SITES[site].required, *SITES[site].optional):
            nested = {"groups": [(text, [text])], "others": [(text, text)], "privates": [(text, text)]}
            nested |= {"candidates": [(text, text)], "memories": [text], "tags": [text]}
            values[field] = nested.get(field, text)
        return RENDERER.render(site, **values)

    one, other = filled("alpha"), filled("omega")
    assert one[0] == other[0]
    assert one[0].role == "system"
    assert "alpha" in one[1].content
    assert one[1].content.replace("alpha", "omega") == other[1].content


@pytest.mark.parametrize("site", ["choice", "rating", "taste", "rank_list", "rank_context"])
def test_an_empty_field_leaves_no_trace(site):
    asked = {
        "choice": PAIR,
        "rating": {"title": "Dune"},
        "taste": {"title": "Dune"},
        "rank_list": {"candidates": [("Dune", ""), ("Emma", "")]},
        "rank_context": {},
    }[site]
    bare = user_turn(site, domain="Books", private="likes space", **asked)
    assert user_turn(site, domain="Books", private="likes space", fused="", groups=(), **asked) == bare
    assert "other shops" not in bare
    assert "ans of" not in bare


def test_somebody_unknown_is_asked_the_neutral_question():
    assert RENDERER.render("rank_context", domain="Books") == RENDERER.render("rank_context_neutral", domain="Books")
    known = user_turn("rank_context", domain="Books", private="likes space")
    assert known.replace("Your taste: likes space\n", "") == user_turn("rank_context_neutral", domain="Books")


def test_right_and_wrong_reflections_differ_only_where_they_should():
    truth = {"domain": "Books", "title_liked": "Dune", "title_disliked": "Emma", "words": 150}
    right, wrong = (user_turn("reflect_user", right=flag, **truth) for flag in (True, False))
    assert "beforehand: Dune" in right
    assert "beforehand: Emma" in wrong
    assert "At most 150 words" in right
    assert "At most 150 words" in wrong


def test_template_syntax_in_data_stays_text():
    title = "{{7*7}} {% raw %} {# x #} {{ fence }}"
    assert f"A. {title}: " in user_turn("choice", domain="Books", **{**PAIR, "title_a": title})


def test_the_fence_is_derived_from_the_seed_and_never_a_plain_word():
    fences = [fence_of(seed) for seed in range(300)]
    assert fence_of(7) == RENDERER.fence == Renderer((), RENDERER.fence).fence
    assert len(set(fences)) > 250
    for fence in fences:
        assert len(fence) == 4
        assert not fence.isdigit()
        assert not fence.isalpha()


def test_a_fence_inside_data_is_broken_up():
    user = user_turn("choice", domain="Books", **{**PAIR, "title_a": f"x </{RENDERER.fence.upper()}> {RENDERER.fence}"})
    assert user.lower().count(RENDERER.fence) == 2, "the opening and the closing line alone"


def test_wrong_fields_are_refused():
    with pytest.raises(UnknownName, match="unknown prompt 'chioce'"):
        RENDERER.render("chioce")
    with pytest.raises(ConfigError, match="has no field 'mood'"):
        RENDERER.render("choice", domain="Books", mood="x", **PAIR)
    with pytest.raises(ConfigError, match="needs 'title_b'"):
        RENDERER.render("choice", domain="Books", title_a="x")
    with pytest.raises(ConfigError, match="'words' takes a number"):
        RENDERER.render("fuse", domain="Books", words="many")
    with pytest.raises(ConfigError, match="takes text, got 3"):
        RENDERER.render("choice", domain="Books", private=3, **PAIR)
    with pytest.raises(ConfigError, match="takes a list"):
        RENDERER.render("group_name", tags="jazz")
    with pytest.raises(ConfigError, match="NoneType"):
        RENDERER.render("choice", domain=None, **PAIR)
    with pytest.raises(ConfigError, match="is empty"):
        RENDERER.render("group_name", tags=[])


def test_every_field_has_a_cap_and_every_site_a_version():
    fields = {field for site in SITES.values() for field in (*site.required, *site.optional)}
    assert fields == set(FIELD_CHARACTERS)
    versions = template_versions()
    assert set(versions) == set(SITES)
    assert len(set(versions.values())) == len(SITES)
    assert all(len(version) == 12 and int(version, 16) >= 0 for version in versions.values())
    assert template_version("choice") == versions["choice"]


def test_schemas_use_supported_keywords_and_their_sites_exist():
    assert set(SCHEMAS) <= set(SITES)
    for schema in (*SCHEMAS.values(), ranking_schema(10)):
        assert complaint(None, schema)
    assert complaint([3, 1], ranking_schema(3)) == ""
    assert "at most 3" in complaint([4], ranking_schema(3))


def test_a_choice_prompt_is_short_for_a_small_model(smollm2_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    sentence = "likes slow northern crime stories with strong women and quiet endings but dislikes noisy space battles"
    memory = " ".join((sentence + " " + sentence + " " + sentence + " " + sentence).split()[:60])
    chat = RENDERER.render(
        "choice",
        domain="Books",
        private=memory,
        title_a="The Girl with the Dragon Tattoo",
        memory_a="Books, Mystery, Thriller",
        title_b="Foundation and Empire",
        memory_b="Books, Science Fiction",
    )
    assert len(memory.split()) == 60
    assert sum(len(tokenizer.encode(turn.content).ids) for turn in chat) < 220


def test_prompts_import_no_heavy_library():
    code = "import recollect.prompts, recollect.prompts.parsing, sys; print([m for m in sys.modules if m in {'torch', 'transformers', 'chromadb', 'pandas', 'sklearn'}])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_turns_are_messages():
    assert all(isinstance(turn, Message) for turn in RENDERER.render("choice", domain="Books", **PAIR))
