import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polarcache.cache_service.tiers.pool import PAGE_ALIGNMENT_BYTES, Page, PagePool

CAPACITY = 64 * PAGE_ALIGNMENT_BYTES


def overlap(one: Page, other: Page) -> bool:
    return (
        one.offset < other.offset + other.extent_bytes
        and other.offset < one.offset + one.extent_bytes
    )


@given(
    st.lists(
        st.one_of(
            st.integers(1, 5 * PAGE_ALIGNMENT_BYTES).map(lambda size: ("allocate", size)),
            st.integers(0, 100).map(lambda which: ("free", which)),
        ),
        max_size=80,
    )
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_pages_never_overlap_and_all_room_comes_back(steps: list[tuple[str, int]]) -> None:
    pool = PagePool(CAPACITY + 17, torch.device("cpu"))
    pages: list[Page] = []
    for action, number in steps:
        if action == "allocate":
            page = pool.allocate(number)
            if page is not None:
                assert page.offset % PAGE_ALIGNMENT_BYTES == 0
                assert page.offset + page.extent_bytes <= CAPACITY
                assert not any(overlap(page, other) for other in pages)
                pages.append(page)
        elif pages:
            pool.free(pages.pop(number % len(pages)))
        assert pool.used_bytes == sum(page.extent_bytes for page in pages)
    for page in pages:
        pool.free(page)
    assert pool.used_bytes == 0
    assert pool.allocate(CAPACITY) == Page(0, CAPACITY)


def test_no_room_gives_no_page() -> None:
    pool = PagePool(CAPACITY, torch.device("cpu"))
    assert pool.allocate(CAPACITY + 1) is None
    pool.limit_bytes = PAGE_ALIGNMENT_BYTES
    assert pool.allocate(PAGE_ALIGNMENT_BYTES) is not None
    assert pool.allocate(1) is None


def test_a_view_shares_the_pool_s_memory() -> None:
    pool = PagePool(CAPACITY, torch.device("cpu"))
    page = pool.allocate(100)
    assert page is not None
    pool.view(page).fill_(7)
    assert pool.memory[page.offset : page.offset + 100].eq(7).all()
    assert pool.view(page).shape == (100,)
