//! An interval tree: who subscribed to which pages.
//!
//! What    a treap ordered by first page, every node of which knows the last page of its subtree, so that a search
//!         visits what overlaps and the path to it, and nothing else.
//! Why     a change of a page asks for its subscribers in the fault path: it must neither allocate nor look at
//!         those of other pages. Nodes are made before the lock is taken and dropped after it was let go.
//! Fails   nothing here fails.

use alloc::boxed::Box;
use core::cmp::Ordering;

use super::index::{Index, Room};

use uhmm_addr::{VaRange, Vpn};

/// An interval in the tree, or about to be.
#[derive(Debug)]
pub(super) struct Node<T> {
    range: VaRange,
    /// Tells intervals of the same first page apart.
    id: u64,
    /// The furthest end of the subtree.
    reach: Vpn,
    left: Link<T>,
    right: Link<T>,
    pub(super) value: T,
}

type Link<T> = Option<Box<Node<T>>>;

/// The tree.
#[derive(Debug)]
pub(super) struct Tree<T> {
    root: Link<T>,
    len: usize,
    index: Index,
}

impl<T> Node<T> {
    /// A node for `range`; `id` is nobody else's.
    pub(super) fn new(range: VaRange, id: u64, value: T) -> Box<Self> {
        Box::new(Self { range, id, reach: range.end_page(), left: None, right: None, value })
    }

    /// The treap's priority: a hash of what never changes.
    const fn priority(&self) -> u64 {
        (self.id ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31)
    }

    fn compare(&self, first: Vpn, id: u64) -> Ordering {
        (self.range.first(), self.id).cmp(&(first, id))
    }

    fn update(&mut self) {
        let reach = |link: &Link<T>| link.as_ref().map(|node| node.reach);
        self.reach =
            self.range.end_page().max(reach(&self.left).max(reach(&self.right)).unwrap_or(Vpn::new(0)));
    }

    fn visit<'t>(&'t self, range: VaRange, found: &mut dyn FnMut(VaRange, &'t T)) {
        if self.reach <= range.first() {
            return;
        }
        if let Some(left) = &self.left {
            left.visit(range, found);
        }
        if self.range.first() < range.end_page() {
            if self.range.end_page() > range.first() {
                found(self.range, &self.value);
            }
            if let Some(right) = &self.right {
                right.visit(range, found);
            }
        }
    }
}

impl<T> Tree<T> {
    pub(super) const fn new() -> Self {
        Self { root: None, len: 0, index: Index::new() }
    }

    /// Puts a node in. `room` is for an index of all intervals, one more than [`Tree::wants_room`] said, if it did.
    pub(super) fn insert(&mut self, node: Box<Node<T>>, room: &mut Room) {
        let range = node.range;
        let (below, above) = split(self.root.take(), node.range.first(), node.id);
        self.root = merge(merge(below, Some(node)), above);
        self.len += 1;
        let root = &self.root;
        if !self.index.is_full() || !self.index.rewrite(self.len, room, |f| each(root, f)) {
            self.index.add(range);
        }
    }

    /// For how many intervals the next insertion wants room, if it does.
    pub(super) fn wants_room(&self) -> Option<usize> {
        self.index.is_full().then_some(self.len)
    }

    /// Takes the interval that begins at `first` and is called `id` out.
    pub(super) fn remove(&mut self, first: Vpn, id: u64) -> Option<Box<Node<T>>> {
        let (below, rest) = split(self.root.take(), first, id);
        let (taken, above) = split(rest, first, id + 1);
        self.root = merge(below, above);
        self.len -= usize::from(taken.is_some());
        taken
    }

    /// Calls `found` for every interval that overlaps `range`, from the first on.
    pub(super) fn overlapping<'t>(&'t self, range: VaRange, mut found: impl FnMut(VaRange, &'t T)) {
        if let Some(root) = &self.root
            && self.index.may_overlap(range)
        {
            root.visit(range, &mut found);
        }
    }
}

/// Every interval, in order of their first pages.
fn each<T>(link: &Link<T>, f: &mut dyn FnMut(VaRange)) {
    if let Some(node) = link {
        each(&node.left, f);
        f(node.range);
        each(&node.right, f);
    }
}

/// Cuts a tree in front of (`first`, `id`).
fn split<T>(link: Link<T>, first: Vpn, id: u64) -> (Link<T>, Link<T>) {
    let Some(mut node) = link else { return (None, None) };
    if node.compare(first, id).is_lt() {
        let (below, above) = split(node.right.take(), first, id);
        node.right = below;
        node.update();
        (Some(node), above)
    } else {
        let (below, above) = split(node.left.take(), first, id);
        node.left = above;
        node.update();
        (below, Some(node))
    }
}

/// Joins two trees; all of `below` lies in front of all of `above`.
fn merge<T>(below: Link<T>, above: Link<T>) -> Link<T> {
    match (below, above) {
        (None, link) | (link, None) => link,
        (Some(mut below), Some(mut above)) => {
            if below.priority() > above.priority() {
                below.right = merge(below.right.take(), Some(above));
                below.update();
                Some(below)
            } else {
                above.left = merge(Some(below), above.left.take());
                above.update();
                Some(above)
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use uhmm_addr::PageCount;

    fn pages(first: usize, pages: usize) -> VaRange {
        VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
    }

    fn found(tree: &Tree<u64>, range: VaRange) -> Vec<u64> {
        let mut all = Vec::new();
        tree.overlapping(range, |_, value| all.push(*value));
        all.sort_unstable();
        all
    }

    #[test]
    fn finds_what_a_plain_list_finds() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        let (mut tree, mut list) = (Tree::new(), Vec::new());
        for id in 0..2000 {
            if random(3) == 0 && !list.is_empty() {
                let (range, id): (VaRange, u64) = list.swap_remove(random(list.len() as u64) as usize);
                assert_eq!(tree.remove(range.first(), id).map(|node| node.value), Some(id));
                assert!(tree.remove(range.first(), id).is_none());
            } else {
                let range = pages(random(50_000) as usize, 1 + random(40) as usize);
                // Now and then there is too little room, or none.
                let mut room = match random(3) {
                    0 => Room::default(),
                    _ => Room::new(tree.wants_room().map_or(0, |len| len + 1)),
                };
                tree.insert(Node::new(range, id, id), &mut room);
                list.push((range, id));
            }
            // Around one that was put in just now, or anywhere.
            let near = list.last().map_or(0, |(range, _): &(VaRange, u64)| range.first().get());
            let from = if random(2) == 0 {
                near.saturating_sub(random(40) as usize)
            } else {
                random(50_000) as usize
            };
            let asked = pages(from, 1 + random(60) as usize);
            let mut expected: Vec<u64> = list
                .iter()
                .filter(|(range, _)| range.intersect(asked).is_some())
                .map(|(_, id)| *id)
                .collect();
            expected.sort_unstable();
            assert_eq!(found(&tree, asked), expected);
        }
    }

    #[test]
    fn a_search_elsewhere_does_not_walk_the_tree() {
        fn depth<T>(link: &Link<T>) -> usize {
            link.as_ref().map_or(0, |node| 1 + depth(&node.left).max(depth(&node.right)))
        }
        let mut tree = Tree::new();
        (0..10_000).for_each(|id| {
            let mut room = Room::new(id as usize + 1);
            tree.insert(Node::new(pages(8 * id as usize, 8), id, id), &mut room);
        });
        assert!(depth(&tree.root) < 50, "{}", depth(&tree.root));
        assert_eq!(found(&tree, pages(80_000, 100)), []);
        assert_eq!(found(&tree, pages(79, 2)), [9, 10]);
    }
}
