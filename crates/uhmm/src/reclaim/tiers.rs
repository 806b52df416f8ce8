//! Nodes, which lie between RAM and the device: where there is room, and what has to go on to the device.
//!
//! Source  `demote_folio_list` in the kernel's `mm/vmscan.c`.

use std::sync::Arc;

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};
use uhmm_core::pagemap::Pagemap;

use super::Reclaimer;
use crate::managed::Managed;

/// Batches after which a full node is looked at again from which nothing could be demoted: a look is a walk.
const NODE_REST: u32 = 64;

impl Reclaimer {
    /// A node with room, for `wanted` pages if that can be had by demoting others, and how much there is.
    pub(super) fn node_with_room(&mut self, wanted: PageCount) -> Option<(Arc<Pagemap>, PageCount)> {
        let nodes = self.nodes.clone()?;
        let with_room =
            |map: Arc<Pagemap>| Some(room_on(&map)).filter(|room| !room.is_zero()).map(|room| (map, room));
        let found = || nodes.online().into_iter().find_map(with_room);
        if let Some(found) = found() {
            return Some(found);
        }
        if self.node_rest > 0 {
            self.node_rest -= 1;
            return None;
        }
        for node in nodes.online() {
            if !self.demote(&node, wanted).is_zero() {
                return found();
            }
        }
        self.node_rest = NODE_REST;
        None
    }

    /// Sends about `wanted` pages of a node on to the device. Which of them were used lately nobody knows where they are
    /// mapped in place, and where they are not none was: they go round by round, in the order of their addresses.
    /// Returns how many went.
    fn demote(&mut self, node: &Pagemap, wanted: PageCount) -> PageCount {
        if self.scratch.is_none() {
            self.scratch = Managed::scratch().ok();
        }
        let Some((scratch, _)) = &mut self.scratch else { return PageCount::ZERO };
        let mm = self.managed.mm();
        let (mut moved, mut rounds) = (PageCount::ZERO, 0);
        while moved < wanted && rounds < 2 {
            let Some((range, _)) = self.managed.range_from(self.node_hand) else {
                rounds += 1;
                self.node_hand = Vpn::new(0);
                continue;
            };
            let window = range.take(PageCount::new(CHUNK_PAGES - range.first().in_chunk()));
            self.node_hand = window.end_page();
            let on_node =
                |page: Vpn| mm.table().entry(page).load().pfn().is_some_and(|pfn| node.contains(pfn));
            let Some(first) = window.iter().find(|page| on_node(*page)) else { continue };
            // As many as are wanted, and no more: the others are read faster where they are.
            let part = VaRange::of_pages(first, window.end_page().since(first));
            let part = part.map_or(window, |part| part.take(wanted.minus(moved)));
            let done = mm.evict_pfns(part, node.range(), Some(&self.to), scratch);
            moved = moved.plus(done.moved);
            if !done.moved.is_zero() {
                self.node_hand = part.end_page();
            }
        }
        moved
    }
}

/// Pages that can be put on a node.
fn room_on(node: &Pagemap) -> PageCount {
    if node.is_stopped() {
        return PageCount::ZERO;
    }
    let bad: usize = node.bad_pages().iter().map(|bad| bad.pages.get()).sum();
    node.range().pages.minus(node.live()).minus(PageCount::new(bad))
}
