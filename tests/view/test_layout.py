"""What the layout promises: nothing overlaps, everything stands in its cluster, long graphs are wrapped."""

import itertools

import pytest

pytest.importorskip("py_mini_racer")

from autosparse_fx.view.layout import Box, Layout, place


def chain(length: int, per_cluster: int = 5) -> tuple[list[Box], list[tuple[str, str | None]], list[tuple[str, str]]]:
    boxes = [Box(f"n{i}", 80 + 10 * (i % 3), 30, f"c{i // per_cluster}") for i in range(length)]
    clusters: list[tuple[str, str | None]] = [(f"c{i}", None) for i in range((length + per_cluster - 1) // per_cluster)]
    edges = [(f"n{i}", f"n{i + 1}") for i in range(length - 1)]
    edges += [(f"n{i}", f"n{i + per_cluster - 1}") for i in range(0, length - per_cluster, per_cluster)]
    return boxes, clusters, edges


def draw(length: int, aspect: float = 1.5) -> tuple[list[Box], Layout]:
    boxes, clusters, edges = chain(length)
    return boxes, place(boxes, clusters, edges, aspect=aspect, header=16, gap=18)


@pytest.mark.parametrize("length", [1, 12, 60])
def test_no_two_boxes_overlap_and_all_are_inside(length: int) -> None:
    boxes, layout = draw(length)
    rectangles = []
    for box in boxes:
        x, y = layout.centres[box.id]
        rectangles.append((x - box.width / 2, y - box.height / 2, x + box.width / 2, y + box.height / 2))
    for a, b in itertools.combinations(rectangles, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert all(x0 >= 0 and x1 <= layout.width and y0 >= 0 and y1 <= layout.height for x0, y0, x1, y1 in rectangles)


def test_each_box_is_in_a_part_of_its_cluster_and_in_no_other() -> None:
    boxes, layout = draw(60)
    for box in boxes:
        x, y = layout.centres[box.id]
        around = {r.id for r in layout.regions if r.x0 < x < r.x1 and r.y0 < y < r.y1}
        assert around == {box.parent}


def test_a_long_graph_is_wrapped_to_about_the_shape_that_is_wanted() -> None:
    _, wide = draw(60, aspect=2.0)
    _, tall = draw(60, aspect=0.3)
    assert wide.width / wide.height > 0.8
    assert tall.width / tall.height < 0.6


def test_edges_go_from_box_to_box() -> None:
    boxes, layout = draw(60)
    sizes = {box.id: box for box in boxes}
    for route in layout.routes:
        for end, point in ((route.source, route.points[0]), (route.target, route.points[-1])):
            x, y = layout.centres[end]
            assert abs(point[0] - x) <= sizes[end].width / 2 + 1
            assert abs(point[1] - y) <= sizes[end].height / 2 + 1


def test_light_edges_place_nothing() -> None:
    boxes = [Box(name, 50, 20) for name in "abc"]
    edges = [("a", "b"), ("a", "c")]
    layout = place(boxes, [], edges, aspect=1, header=10, gap=10, light={("a", "c")})
    assert layout.centres["c"][1] == layout.centres["a"][1] < layout.centres["b"][1]
    assert [route.far for route in layout.routes] == [False, True]


def test_a_cycle_and_names_of_any_kind_are_placed() -> None:
    names = ['"quoted"', "</script>", "a\\b\nc", "constructor"]
    boxes = [Box(name, 50, 20) for name in names]
    layout = place(boxes, [], list(itertools.pairwise([*names, names[0]])), aspect=1, header=10, gap=10)
    assert set(layout.centres) == set(names)


def test_nothing_is_placed_nowhere() -> None:
    layout = place([], [], [], aspect=1, header=10, gap=10)
    assert (layout.centres, layout.routes) == ({}, ())
