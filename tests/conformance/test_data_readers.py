"""Every kind of raw folder, in the forms people publish, ends in the same checked data set."""

import gzip
import json

import numpy as np
import pytest

from recollect.data import (
    KINDS,
    describe,
    detect_kind,
    fingerprint,
    import_dataset,
    load_dataset,
    read_folder,
    read_kind,
    tables,
)

GENRES = 19


def ml_100k(folder):
    (folder / "u.data").write_text("2\t10\t3\t881250949\n1\t10\t5\t881250950\n1\t20\t4\t881250940\n")
    flags = ["0"] * GENRES
    flags[3] = flags[5] = "1"
    none = ["0"] * GENRES
    rows = [
        "|".join(["10", "Caf\xe9 Story (1995)", "01-Jan-1995", "", "http://x", *flags]),
        "|".join(["20", "GoldenEye (1995)", "01-Jan-1995", "", "http://y", *none]),
    ]
    (folder / "u.item").write_bytes(("\n".join(rows) + "\n").encode("latin-1"))
    (folder / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|94043\n")


def ml_1m(folder):
    (folder / "ratings.dat").write_text("2::10::3::978300760\n1::10::5::978302109\n1::20::4::978301968\n")
    movies = "10::Caf\xe9 Story (1995)::Animation|Comedy\n20::GoldenEye: Again (1995)::Action\n"
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")


def ml_1m_sequences(folder):
    ml_1m(folder)
    (folder / "ratings.dat").unlink()
    (folder / "sequences.tsv").write_text("1\t20 10\n2\t10\n")


def recbole(folder):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\tsession:token\tdwell:float\n"
    rows = "2\t10\t3\t881250949.0\ts1\t1.5\n1\t10\t5\t881250950\ts2\t2.5\n1\t20\t4\t881250940.7\ts2\t0.5\n"
    (folder / "tiny.inter").write_text(header + rows)
    items = 'item_id:token\tmovie_title:token_seq\tclass:token_seq\n10\tThe "Café" Story\tAnimation Comedy\n'
    (folder / "tiny.item").write_text(items + "20\tGoldenEye\tAction\n")
    (folder / "tiny.user").write_text("user_id:token\tage:float\n1\t24\n2\t53\n")


def csv(folder):
    log = "user_id,item_id,timestamp,rating,domain\n2,10,881250949,3,films\n"
    log += "1,10,881250950,5,films\n1,20,881250940,4,books\n"
    (folder / "interactions.csv").write_text(log)
    items = (
        'item_id,title,categories,text,domain,price\n10,"Café, the ""Story""",Animation|Comedy,"two\nlines",films,3\n'
    )
    (folder / "items.csv").write_text(items + "20,GoldenEye,Action,,books,4\n")
    (folder / "users.csv").write_text("user_id,age\n1,24\n2,53\n")


def sequences(folder):
    (folder / "sequences.txt").write_text("1 20 10\n2 10\n")
    rows = [
        {"item_id": 10, "title": "Café Story", "categories": ["Animation", "Comedy"], "description": None},
        {"item_id": 20, "title": "GoldenEye", "categories": "Films,Action,Arts, Crafts", "brand": "MGM"},
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def amazon_2023(folder):
    for name, items in (("Books", ["10"]), ("CDs_and_Vinyl", ["20"])):
        rows = [
            {
                "user_id": user,
                "parent_asin": item,
                "rating": 5.0,
                "timestamp": 1_600_000_000_000 + 1000 * at,
                "images": [],
            }
            for at, (user, item) in enumerate((user, item) for user in ("1", "2") for item in items)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        meta = {"parent_asin": items[0], "title": f"Title {items[0]}", "categories": [name], "description": ["a", "b"]}
        (folder / f"meta_{name}.jsonl").write_text(json.dumps(meta | {"store": "S", "price": 3.5}) + "\n")


def amazon_2014(folder):
    rows = [
        {"reviewerID": user, "asin": item, "overall": 4.0, "unixReviewTime": 1_300_000_000 + at, "helpful": [0, 1]}
        for at, (user, item) in enumerate((("2", "10"), ("1", "10"), ("1", "20")))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress(text))
    # the published 2014 metadata are Python literals and incomplete
    meta = "{'asin': '10', 'title': \"Women's soap\", 'categories': [['Beauty', 'Soap'], ['Beauty', 'Bath']]}\n"
    (folder / "meta_Beauty.json.gz").write_bytes(gzip.compress(meta.encode()))


def amazon_tsv(folder):
    text = "user_id\tparent_asin\trating\ttimestamp\n2\t10\t3.0\t1600000000\n"
    text += "1\t10\t5.0\t1600000001\n1\t20\t4\t1600000002\n"
    (folder / "ratings_Books.tsv").write_text(text)


def goodbooks(folder):
    names = "book_id,authors,original_publication_year,title,language_code,average_rating,image_url"
    rows = '10,"A, B",1995.0,"Café, a Story",eng,4.3,u\n20,C,,GoldenEye,eng,4.0,v\n'
    (folder / "books.csv").write_text(f"{names}\n{rows}")
    (folder / "ratings.csv").write_text("user_id,book_id,rating\n2,10,3\n1,20,4\n1,10,5\n")


FORMS = {
    "ml-100k": ("ml-100k", ml_100k),
    "ml-1m": ("ml-1m", ml_1m),
    "ml-1m sequences": ("ml-1m", ml_1m_sequences),
    "recbole": ("recbole", recbole),
    "csv": ("csv", csv),
    "sequences": ("sequences", sequences),
    "amazon 2014": ("amazon", amazon_2014),
    "amazon 2023": ("amazon", amazon_2023),
    "amazon tsv": ("amazon", amazon_tsv),
    "goodbooks": ("goodbooks", goodbooks),
}


@pytest.fixture
def made(tmp_path):
    def make(form):
        kind, write = FORMS[form]
        folder = tmp_path / "raw"
        folder.mkdir()
        write(folder)
        return kind, folder

    return make


def test_every_kind_is_covered():
    assert {kind for kind, _ in FORMS.values()} == set(KINDS)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_one_checked_data_set(made, tmp_path, form):
    kind, folder = made(form)
    dataset = import_dataset(kind, folder, tmp_path / "out")
    log = dataset.interactions
    assert sorted(dataset.users.user_ids) == ["1", "2"]
    assert sorted(dataset.catalog.item_ids) == ["10", "20"]
    assert (np.lexsort((log.row, log.time, log.user)) == np.arange(len(log))).all()
    assert log.user.dtype == log.item.dtype == log.time.dtype == np.int64
    assert log.domain.dtype == dataset.catalog.domain.dtype == np.int16
    one = int(np.flatnonzero(dataset.users.user_ids == "1")[0])
    mine = [dataset.catalog.item_ids[item] for item in log.item[log.user == one]]
    assert mine in (["20", "10"], ["10", "20"])
    if not form.startswith("amazon"):
        assert mine == ["20", "10"]  # by time, not by file order
    again = read_folder(tmp_path / "out")
    assert fingerprint(again) == fingerprint(dataset)
    assert describe(again)["counts"] == describe(dataset)["counts"]
    assert detect_kind(folder) == kind
    assert fingerprint(load_dataset(folder)) == fingerprint(dataset)


@pytest.mark.parametrize("form", ["ml-100k", "ml-1m", "ml-1m sequences", "recbole", "sequences", "goodbooks"])
def test_gzipped_files_read_the_same(made, form):
    kind, folder = made(form)
    plain = read_kind(kind, folder)
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = read_kind(kind, folder)
    assert fingerprint(packed) == fingerprint(plain)
    assert packed.catalog.titles.tolist() == plain.catalog.titles.tolist()


def item(dataset, item_id):
    return int(np.flatnonzero(dataset.catalog.item_ids == item_id)[0])


def test_movielens_titles_genres_and_people(made):
    kind, folder = made("ml-100k")
    dataset = read_kind(kind, folder)
    at = item(dataset, "10")
    assert dataset.catalog.titles[at] == "Café Story (1995)"
    assert dataset.catalog.categories[at] == ("Animation", "Comedy")
    assert dataset.catalog.categories[item(dataset, "20")] == ()
    assert dataset.catalog.extra["year"][at] == 1995
    assert dataset.users.attributes["occupation"].tolist() == ["technician", "other"]
    assert dataset.interactions.rating.tolist() == [4.0, 5.0, 3.0]


def test_movielens_1m_codes_become_words(made):
    kind, folder = made("ml-1m")
    dataset = read_kind(kind, folder)
    assert dataset.clock == "unix"
    assert dataset.catalog.titles[item(dataset, "20")] == "GoldenEye: Again (1995)"
    assert dataset.users.attributes["occupation"].tolist() == ["K-12 student", "self-employed"]
    assert dataset.interactions.time.tolist() == [978301968, 978302109, 978300760]


def test_sequences_have_positions_for_times_and_say_so(made):
    for form in ("ml-1m sequences",):
        kind, folder = made(form)
        dataset = read_kind(kind, folder)
        assert dataset.clock == "position"
        assert dataset.interactions.time.tolist() == [0, 1, 0]


def test_recbole_context_and_unread_columns(made):
    kind, folder = made("recbole")
    dataset = read_kind(kind, folder)
    assert dataset.interactions.context["dwell"].tolist() == [0.5, 2.5, 1.5]
    assert dataset.interactions.time.tolist() == [881250940, 881250950, 881250949]
    assert dataset.meta["warnings"] == ["columns of tiny.inter that were not read: session"]
    assert dataset.catalog.titles[item(dataset, "10")] == 'The "Café" Story'
    assert dataset.catalog.categories[item(dataset, "10")] == ("Animation", "Comedy")


def test_csv_follows_the_contract(made):
    kind, folder = made("csv")
    dataset = read_kind(kind, folder)
    at = item(dataset, "10")
    assert dataset.catalog.titles[at] == 'Café, the "Story"'
    assert dataset.catalog.texts[at] == "two\nlines"
    assert dataset.catalog.texts[item(dataset, "20")] is None
    assert dataset.catalog.categories[at] == ("Animation", "Comedy")
    assert dataset.catalog.extra["price"].tolist() == ["4", "3"]
    assert set(dataset.domains) == {"films", "books"}
    log = dataset.interactions
    assert [dataset.domains[code] for code in log.domain] == ["books", "films", "films"]
    assert (dataset.catalog.domain[log.item] == log.domain).all()


def test_sequences_read_categories_and_texts(made):
    kind, folder = made("sequences")
    dataset = read_kind(kind, folder)
    assert dataset.catalog.categories[item(dataset, "20")] == ("Films", "Action", "Arts, Crafts")
    assert dataset.catalog.extra["brand"].tolist() == ["MGM", None]


def test_amazon_2023_files_are_domains_and_milliseconds_become_seconds(made):
    kind, folder = made("amazon 2023")
    dataset = read_kind(kind, folder)
    assert dataset.domains == ("books", "cds_and_vinyl")
    assert dataset.interactions.time.min() == 1_600_000_000
    at = item(dataset, "10")
    assert (dataset.catalog.titles[at], dataset.catalog.texts[at]) == ("Title 10", "a b")
    assert dataset.domains[dataset.catalog.domain[item(dataset, "20")]] == "cds_and_vinyl"


def test_amazon_items_without_metadata_stay_with_an_empty_title(made):
    kind, folder = made("amazon 2014")
    dataset = read_kind(kind, folder)
    assert dataset.catalog.titles[item(dataset, "10")] == "Women's soap"
    assert dataset.catalog.categories[item(dataset, "10")] == ("Beauty", "Soap", "Bath")
    assert dataset.catalog.titles[item(dataset, "20")] == ""
    assert any("not in" in warning for warning in dataset.meta["warnings"])


def test_importing_the_package_loads_no_reader():
    import subprocess
    import sys

    code = "import sys, recollect.data; sys.exit(any(name.startswith('pyarrow') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_amazon_reviews_read_in_many_blocks_are_those_read_in_one(tmp_path, monkeypatch):
    rows = [(f"u{n * 7 % 40}", f"i{n * 11 % 60}", n % 5 + 1, 1_600_000_000_000 + n * 1000) for n in range(400)]
    lines = [
        json.dumps({"user_id": u, "parent_asin": i, "rating": r, "timestamp": t, "text": "x" * 50})
        for u, i, r, t in rows
    ]
    for name in ("Books", "Games"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    whole = read_kind("amazon", tmp_path)
    monkeypatch.setattr(tables, "JSON_BLOCK_BYTES", 1000)
    assert fingerprint(read_kind("amazon", tmp_path)) == fingerprint(whole)
    log = whole.interactions
    assert {
        (whole.users.user_ids[u], whole.catalog.item_ids[i], int(r), int(t))
        for u, i, r, t in zip(log.user, log.item, log.rating, log.time, strict=True)
    } == {(u, i, r, t // 1000) for u, i, r, t in rows}
