//! Who has which pfns: gaps, nesting, conflicts, and what `/proc/iomem` would show.

use std::string::ToString;
use std::vec::Vec;

use uhmm_addr::{PageCount, Pfn, PfnRange};

use super::{Intersection, ResourceError, ResourceKind, ResourceTree};

const RAM: ResourceKind = ResourceKind::SystemRam;
const PMEM: ResourceKind = ResourceKind::PersistentMemory;
const NONE: ResourceKind = ResourceKind::None;

fn range(start: u64, pages: usize) -> PfnRange {
    PfnRange::new(Pfn::new(start), PageCount::new(pages))
}

/// A machine of 1000 pages, with RAM at its start and a window of persistent memory above.
fn machine() -> ResourceTree {
    let mut tree = ResourceTree::new(range(0, 1000));
    tree.insert(range(0, 100), "System RAM", RAM).unwrap();
    tree.insert(range(400, 200), "Persistent Memory", PMEM).unwrap();
    tree
}

fn free(tree: &mut ResourceTree, pages: usize, align: usize) -> Option<PfnRange> {
    let (pages, align) = (PageCount::new(pages), PageCount::new(align));
    tree.request_free_region(pages, align, "free", ResourceKind::DevicePrivate).ok().map(|got| got.range)
}

#[test]
fn free_regions_come_from_the_top_down() {
    let mut tree = machine();
    assert_eq!(free(&mut tree, 100, 1), Some(range(900, 100)));
    assert_eq!(free(&mut tree, 250, 64), Some(range(640, 250)), "aligned");
    assert_eq!(free(&mut tree, 250, 64), Some(range(128, 250)), "below what is there");
    assert_eq!(free(&mut tree, 30, 1), Some(range(610, 30)), "and in a gap that is left");
    assert_eq!(free(&mut tree, 29, 1), None, "10 are left above, 22 and 28 below");
    assert_eq!(free(&mut tree, 28, 1), Some(range(100, 28)));
}

#[test]
fn no_gap_is_large_enough() {
    let mut tree = machine();
    let all = tree.request_free_region(PageCount::new(401), PageCount::ONE, "x", NONE);
    assert_eq!(all, Err(ResourceError::NoGap(PageCount::new(401), PageCount::ONE)));
    assert!(all.unwrap_err().to_string().contains("401 pages"));
    assert_eq!(free(&mut tree, 0, 1), None, "no pages are no region");
    assert_eq!(free(&mut tree, 400, 1), Some(range(600, 400)));
}

#[test]
fn whatever_is_given_is_disjoint_from_everything() {
    let mut tree = machine();
    let mut given: Vec<PfnRange> = std::vec![range(0, 100), range(400, 200)];
    for n in 0.. {
        let Some(got) = free(&mut tree, 1 + n * 7 % 13, 1 << (n % 4)) else { break };
        assert!(given.iter().all(|other| !other.overlaps(got)), "{got:?} beside {given:?}");
        assert_eq!(got.start.get() % (1 << (n % 4)), 0);
        given.push(got);
    }
    assert!(given.len() > 50);
}

#[test]
fn what_is_busy_lies_inside_regions_and_holds_nothing() {
    let mut tree = machine();
    let namespace = tree.request(range(400, 100), "namespace0.0", NONE).unwrap();
    let dax = tree.request(range(500, 50), "dax0.0", NONE).unwrap();
    let again = tree.request(range(420, 10), "dax0.1", NONE);
    let Err(ResourceError::Conflict(conflict)) = again else { panic!("{again:?}") };
    assert_eq!((&*conflict.name, conflict.range, conflict.busy), ("namespace0.0", range(400, 100), true));
    let across = tree.request(range(590, 20), "across", NONE);
    assert!(matches!(across, Err(ResourceError::Conflict(why)) if &*why.name == "Persistent Memory"));
    let text = "\
00000000-00063fff : System RAM
00190000-00257fff : Persistent Memory
  00190000-001f3fff : namespace0.0
  001f4000-00225fff : dax0.0
";
    assert_eq!(tree.to_string(), text);
    assert_eq!(tree.release(namespace).unwrap().range, range(400, 100));
    assert_eq!(tree.release(namespace), Err(ResourceError::Unknown(namespace)));
    tree.request(range(420, 10), "dax0.1", NONE).unwrap();
    assert_eq!(tree.get(dax).unwrap().range, range(500, 50));
}

#[test]
fn inserting_goes_around_and_into() {
    let mut tree = machine();
    tree.insert(range(350, 300), "bus", NONE).unwrap();
    tree.insert(range(410, 10), "label", NONE).unwrap();
    let depths: Vec<_> = tree.iter().map(|(depth, resource)| (depth, &*resource.name)).collect();
    assert_eq!(depths, [(0, "System RAM"), (0, "bus"), (1, "Persistent Memory"), (2, "label")]);
    let across = tree.insert(range(640, 20), "across", NONE).unwrap_err();
    assert!(across.to_string().contains("\"bus\""), "{across}");
    // One of the same size goes around.
    tree.insert(range(350, 300), "bridge", NONE).unwrap();
    assert_eq!(&*tree.lookup(Pfn::new(350)).unwrap().name, "bridge");
}

#[test]
fn lookup_is_by_start_and_find_by_what_is_inside() {
    let mut tree = machine();
    tree.request(range(400, 100), "namespace0.0", NONE).unwrap();
    assert_eq!(&*tree.lookup(Pfn::new(400)).unwrap().name, "Persistent Memory", "the outer one");
    assert_eq!(tree.lookup(Pfn::new(401)), None, "not its start");
    assert_eq!(&*tree.find(Pfn::new(401)).unwrap().name, "namespace0.0", "the inner one");
    assert_eq!(&*tree.find(Pfn::new(500)).unwrap().name, "Persistent Memory");
    assert_eq!(tree.find(Pfn::new(700)), None);
}

#[test]
fn ranges_grow_and_shrink_among_their_neighbours() {
    let mut tree = machine();
    let first = tree.request(range(400, 50), "dax0.0", NONE).unwrap();
    let second = tree.request(range(500, 50), "dax0.1", NONE).unwrap();
    tree.adjust(first, range(400, 100)).unwrap();
    assert!(matches!(tree.adjust(first, range(400, 101)), Err(ResourceError::Conflict(_))));
    assert!(matches!(tree.adjust(second, range(500, 101)), Err(ResourceError::Outside(..))));
    assert!(matches!(tree.adjust(second, range(500, 0)), Err(ResourceError::Empty(_))));
    tree.adjust(second, range(560, 10)).unwrap();
    let outer = tree.lookup(Pfn::new(400)).unwrap().id;
    let too_small = tree.adjust(outer, range(400, 165));
    assert!(matches!(&too_small, Err(ResourceError::Outside(_, inside, _)) if *inside == range(560, 10)));
    tree.adjust(outer, range(400, 170)).unwrap();
    assert!(matches!(tree.release(outer), Err(ResourceError::Occupied(..))));
    for id in [first, second, outer] {
        tree.release(id).unwrap();
    }
    assert_eq!(tree.iter().count(), 1);
}

#[test]
fn what_lay_inside_takes_the_place_of_what_is_removed() {
    let mut tree = machine();
    let dax = tree.request(range(400, 100), "dax0.0", NONE).unwrap();
    tree.insert(range(420, 10), "label", NONE).unwrap();
    assert!(matches!(tree.release(dax), Err(ResourceError::Occupied(..))));
    assert_eq!(&*tree.remove(dax).unwrap().name, "dax0.0");
    assert_eq!(tree.remove(dax), Err(ResourceError::Unknown(dax)));
    let depths: Vec<_> = tree.iter().map(|(depth, resource)| (depth, &*resource.name)).collect();
    assert_eq!(depths, [(0, "System RAM"), (0, "Persistent Memory"), (1, "label")]);
}

#[test]
fn region_intersects() {
    let mut tree = machine();
    let meets = |tree: &ResourceTree, start, pages, kind| tree.intersects(range(start, pages), kind);
    assert_eq!(meets(&tree, 50, 10, RAM), Intersection::Intersects);
    assert_eq!(meets(&tree, 50, 10, PMEM), Intersection::Disjoint);
    assert_eq!(meets(&tree, 200, 10, RAM), Intersection::Disjoint);
    assert_eq!(meets(&tree, 50, 400, RAM), Intersection::Mixed);
    assert_eq!(meets(&tree, 50, 100, RAM), Intersection::Intersects, "what nobody has is nothing else");
    // Inside a range of another kind it counts where it covers what they have in common.
    tree.insert(range(410, 20), "inside", RAM).unwrap();
    assert_eq!(meets(&tree, 412, 8, RAM), Intersection::Intersects);
    assert_eq!(meets(&tree, 405, 10, RAM), Intersection::Mixed);
    assert_eq!(meets(&tree, 425, 10, RAM), Intersection::Mixed);
    assert_eq!(meets(&tree, 440, 10, RAM), Intersection::Disjoint);
}

#[test]
fn what_lies_outside_of_the_machine_cannot_be_had() {
    let mut tree = machine();
    let beyond = tree.insert(range(990, 20), "beyond", NONE);
    assert!(matches!(beyond, Err(ResourceError::Outside(whole, ..)) if whole == range(0, 1000)));
    assert_eq!(tree.request(range(700, 0), "nothing", NONE), Err(ResourceError::Empty(range(700, 0))));
}
