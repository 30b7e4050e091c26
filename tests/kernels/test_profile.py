import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarcache.kernels import (
    ArcPair,
    Exact,
    Integer,
    Pair,
    Polar,
    Profile,
    ProfileError,
    Recursive,
)

seeds = st.integers(0, 2**32 - 1)
recursives = st.one_of(
    st.builds(
        Recursive,
        st.sampled_from(["analytic", "kmeans"]),
        seeds,
        st.sampled_from(["published", "log8"]),
    ),
    st.builds(Recursive, st.just("analytic"), seeds, st.just("deep")),
)
digits = st.one_of(st.just(""), st.from_regex(r"[0-9a-f]{8}", fullmatch=True))
groups = st.sampled_from([32, 64, 128, 256])
pairs = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda bits: 3 <= sum(bits) <= 8)
key_codecs = st.one_of(
    st.just(Exact()),
    recursives,
    st.builds(
        lambda bits, angles, group: Pair(*bits, angles, group),
        pairs,
        st.sampled_from(["arc", "minmax"]),
        groups,
    ),
    st.builds(lambda bits, group: ArcPair(*bits, 0, group), pairs, groups),
    st.builds(
        lambda tiers, group, cal: ArcPair(0, 0, tiers, group, cal),
        st.integers(5, 8),
        groups,
        digits,
    ),
    st.builds(Polar, st.integers(3, 8), st.just(0), digits),
    st.builds(
        lambda bits, cal: Polar(sum(bits), bits[0], cal),
        pairs.filter(lambda bits: bits[0] <= 4),
        digits,
    ),
)
value_codecs = st.one_of(
    st.just(Exact()),
    recursives,
    st.builds(Polar, st.integers(3, 8)),
    st.builds(lambda bits: Polar(sum(bits), bits[0]), pairs.filter(lambda bits: bits[0] <= 4)),
    st.builds(Integer, st.sampled_from([2, 4]), st.one_of(st.none(), st.integers(1, 256))),
)


@given(st.builds(Profile, key_codecs, value_codecs))
def test_profile_text_parses_back_to_an_equal_profile(profile: Profile) -> None:
    assert Profile.parse(str(profile)) == profile


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("exact", "exact"),
        ("k=exact,v=exact", "exact"),
        ("k=fp16,v=bf16", "exact"),
        ("k=pair,v=int4", "k=pair:r4t4,v=int4"),
        ("k=pair:r4t4,v=int4", "k=pair:r4t4,v=int4"),
        ("k=pair:g64:minmax:r3t5,v=exact", "k=pair:r3t5:minmax:g64,v=exact"),
        ("k=pair:arc:g128,v=int2:g32", "k=pair:r4t4,v=int2"),
        ("k=exact,v=int4:g64", "k=exact,v=int4:g64"),
        ("k=pair:arc2:g64,v=polar", "k=pair:r4t4:arc2:g64,v=polar:b8"),
        ("k=pair:cal0123abcd:tiers6,v=polar:b4", "k=pair:tiers6:cal0123abcd,v=polar:b4"),
        ("k=polar:r2t4,v=polar:r3t5", "k=polar:r2t4,v=polar:r3t5"),
        ("k=polar:cal00000000:b6,v=exact", "k=polar:b6:cal00000000,v=exact"),
        ("k=recursive:seed3:deep,v=recursive:log8", "k=recursive:deep:seed3,v=recursive:log8"),
        ("k=recursive:seed7:kmeans,v=recursive:seed0", "k=recursive:kmeans:seed7,v=recursive"),
    ],
)
def test_profile_text_is_canonical(text: str, canonical: str) -> None:
    assert str(Profile.parse(text)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pair",
        "k=pair",
        "k=int4,v=int4",
        "k=int2,v=exact",
        "k=exact,v=pair",
        "k=exact,v=int3",
        "k=exact,v=int8",
        "v=int4,k=exact",
        "k=exact, v=exact",
        "k=exact,v=exact,",
        "k=exact:g32,v=exact",
        "k=pair:r0t4,v=exact",
        "k=pair:r4t0,v=exact",
        "k=pair:r1t1,v=exact",
        "k=pair:r4t5,v=exact",
        "k=pair:r04t4,v=exact",
        "k=pair:g96,v=exact",
        "k=pair:g64:g64,v=exact",
        "k=pair:arc:minmax,v=exact",
        "k=pair:kmeans,v=exact",
        "k=exact,v=int4:g0",
        "k=exact,v=int4:g257",
        "k=exact,v=int4:r4t4",
        "k=recursive:seed-1,v=exact",
        "k=recursive:seed4294967296,v=exact",
        "k=PAIR,v=exact",
        "k=pair:tiers4,v=exact",
        "k=pair:tiers9,v=exact",
        "k=pair:tiers0,v=exact",
        "k=pair:tiers8:r4t4,v=exact",
        "k=pair:tiers8:arc,v=exact",
        "k=pair:arc2:cal01234567,v=exact",
        "k=pair:cal01234567,v=exact",
        "k=pair:tiers8:cal0123456,v=exact",
        "k=pair:tiers8:cal0123456X,v=exact",
        "k=polar:r5t3,v=exact",
        "k=polar:r1t1,v=exact",
        "k=polar:r0t8,v=exact",
        "k=polar:b2,v=exact",
        "k=polar:b9,v=exact",
        "k=polar:b8:r3t5,v=exact",
        "k=exact,v=polar:cal01234567",
        "k=exact,v=pair:tiers8",
        "k=recursive:deep:kmeans,v=exact",
        "k=recursive:deep:log8,v=exact",
        "k=pair:,v=exact",
        "exact\n",
    ],
)
def test_profile_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match="expected"):
        Profile.parse(text)


def test_integer_keys_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ProfileError, match=r"for keys one of exact, pair.*recursive"):
        Profile.parse("k=int4,v=int4")


def test_pure_modules_import_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "import polarcache.kernels.profile, polarcache.kernels.layout, polarcache.kernels\n"
        "assert str(polarcache.kernels.Profile.parse('k=pair,v=int4')) == 'k=pair:r4t4,v=int4'"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
