//! Who reaches whom, by which way, and what keeps the pages meanwhile.

use alloc::sync::Arc;
use std::sync::Mutex;
use std::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, DmaAddr, PAGE_SIZE, PageCount, Pfn, PfnRange, VaRange, Vpn};

use super::{Forwards, Path, PeerClient, PeerError, PeerId, PeerMemory, Route, Topology};
use crate::device::MemoryType;
use crate::dma::{Iommu, IommuError};
use crate::pagemap::{PageError, Pagemap, Registry};
use crate::sync::{AtomicU32, Park};

/// Two hosts. Below the first a switch with two devices, one of which has two functions, and a port of its own with a
/// third.
struct Machine {
    topology: Topology,
    gpu: [PeerId; 2],
    disk: PeerId,
    alone: PeerId,
    elsewhere: PeerId,
}

fn machine(first: Forwards, second: Forwards, redirects: bool) -> Machine {
    let mut topology = Topology::new();
    let (host, other) = (topology.host(first), topology.host(second));
    let root = topology.bridge(host, false);
    let upstream = topology.bridge(root, false);
    let ports = [(); 2].map(|()| topology.bridge(upstream, redirects));
    let gpu = [(); 2].map(|()| topology.device(ports[0]));
    let disk = topology.device(ports[1]);
    let port = topology.bridge(host, false);
    let alone = topology.device(port);
    let elsewhere = topology.device(other);
    Machine { topology, gpu, disk, alone, elsewhere }
}

fn bus(distance: usize) -> Option<Path> {
    Some(Path { distance, route: Route::Bus })
}

fn host(distance: usize) -> Option<Path> {
    Some(Path { distance, route: Route::HostBridge })
}

#[test]
fn distances_are_those_of_the_kernel() {
    let Machine { topology, gpu, disk, alone, elsewhere } = machine(Forwards::Never, Forwards::Never, false);
    let path = |a, b| topology.path(a, b).ok();
    assert_eq!(
        (path(gpu[0], gpu[0]), path(gpu[0], gpu[1])),
        (bus(0), bus(2)),
        "itself, and a function beside it"
    );
    assert_eq!((path(gpu[0], disk), path(disk, gpu[0])), (bus(4), bus(4)), "under one switch");
    // Beyond the root ports the way leads through the host.
    assert_eq!((path(gpu[0], alone), path(gpu[0], elsewhere)), (None, None));
    let why = topology.path(gpu[0], alone).unwrap_err();
    assert_eq!((why.provider, why.client, why.distance), (gpu[0], alone, 6));
    assert_eq!(topology.distance(gpu[0], &[disk, gpu[1]]), Ok(6));
    assert!(topology.distance(gpu[0], &[disk, alone]).is_err());
}

#[test]
fn a_bridge_that_redirects_sends_everything_through_the_host() {
    let Machine { topology, gpu, disk, .. } = machine(Forwards::Never, Forwards::Never, true);
    assert!(topology.path(gpu[0], disk).is_err(), "which does not pass it on");
    assert_eq!(topology.path(gpu[0], gpu[0]).ok(), bus(0), "no bridge is passed");
    let Machine { topology, gpu, disk, .. } = machine(Forwards::Within, Forwards::Never, true);
    assert_eq!(topology.path(gpu[0], disk).ok(), host(4));
    assert_eq!(topology.path(disk, gpu[0]).ok(), host(4));
}

#[test]
fn hosts_pass_on_what_they_say() {
    for (first, second, near, far) in [
        (Forwards::Within, Forwards::Anywhere, true, false),
        (Forwards::Anywhere, Forwards::Anywhere, true, true),
        (Forwards::Anywhere, Forwards::Within, true, false),
        (Forwards::Never, Forwards::Anywhere, false, false),
    ] {
        let Machine { topology, gpu, alone, elsewhere, .. } = machine(first, second, false);
        assert_eq!(topology.path(gpu[0], alone).is_ok(), near, "{first:?}");
        assert_eq!(topology.path(gpu[0], elsewhere).is_ok(), far, "{first:?} and {second:?}");
        if far {
            assert_eq!(topology.path(gpu[0], elsewhere).ok(), host(5));
        }
    }
}

#[test]
fn the_closest_provider_serves_and_equals_take_turns() {
    let Machine { topology, gpu, disk, alone, .. } = machine(Forwards::Within, Forwards::Never, false);
    assert_eq!(topology.closest(&[alone, disk, gpu[1]], &[gpu[0]], 0), Some((gpu[1], 2)));
    let turns = [0, 1, 2].map(|turn| topology.closest(&[gpu[0], gpu[1]], &[disk], turn).unwrap().0);
    assert_eq!(turns, [gpu[0], gpu[1], gpu[0]]);
    let Machine { topology, gpu, alone, .. } = machine(Forwards::Never, Forwards::Never, false);
    assert_eq!(topology.closest(&gpu, &[alone], 0), None);
    assert_eq!(topology.closest(&[], &[alone], 0), None);
}

struct Yield;

impl Park for Yield {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        std::thread::yield_now();
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

/// Notes what is mapped; refuses when it has two.
#[derive(Clone, Default)]
struct Unit(Arc<Mutex<Vec<VaRange>>>);

impl Iommu for Unit {
    fn map(&mut self, pages: VaRange, _write: bool) -> Result<DmaAddr, IommuError> {
        let mut mapped = self.0.lock().unwrap();
        if mapped.len() == 2 {
            return Err(IommuError::Full);
        }
        mapped.push(pages);
        Ok(DmaAddr::new(0xf000_0000 + pages.start().get() as u64))
    }

    fn unmap(&mut self, pages: VaRange) {
        self.0.lock().unwrap().retain(|mapped| *mapped != pages);
    }
}

const WINDOW: PfnRange = PfnRange::new(Pfn::new(0), PageCount::new(2 * CHUNK_PAGES));

fn window(device: PeerId) -> (Registry, PeerMemory) {
    let registry = Registry::new(Arc::new(Yield));
    let map = registry.register(Pagemap::builder("bar2", MemoryType::PeerToPeer).range(WINDOW)).unwrap();
    let mapped = VaRange::of_pages(Vpn::new(4096), WINDOW.pages);
    (registry, PeerMemory { device, map, bus: DmaAddr::new(0x8000_0000), mapped })
}

fn pages(first: u64, count: usize) -> PfnRange {
    PfnRange::new(Pfn::new(first), PageCount::new(count))
}

#[test]
fn below_the_host_the_bus_is_enough() {
    let Machine { topology, gpu, disk, .. } = machine(Forwards::Never, Forwards::Never, false);
    let (registry, memory) = window(gpu[0]);
    let unit = Unit::default();
    let mut client = PeerClient::new(disk, unit.clone());
    let at = client.map(&topology, &memory, pages(3, 5), true).unwrap();
    assert_eq!(at, DmaAddr::new(0x8000_0000 + 3 * PAGE_SIZE as u64));
    assert!(unit.0.lock().unwrap().is_empty());
    assert_eq!((client.mapped().get(), memory.map.live().get()), (5, 5));
    assert!(registry.unregister(&memory.map, &mut |_| false).is_err(), "it is in use");
    assert!(client.unmap(at) && !client.unmap(at));
    assert!(memory.map.live().is_zero());
    // A provider that goes away unmaps its users first.
    client.map(&topology, &memory, pages(0, 4), false).unwrap();
    client.map(&topology, &memory, pages(8, 4), false).unwrap();
    registry
        .unregister(&memory.map, &mut |_| {
            assert_eq!(client.unmap_all(&memory.map).get(), 8);
            true
        })
        .unwrap();
    let gone = client.map(&topology, &memory, pages(0, 4), false);
    assert!(matches!(gone, Err(PeerError::Page(PageError::Dying(_)))), "{gone:?}");
}

#[test]
fn through_the_host_the_iommu_translates() {
    let Machine { topology, gpu, disk, .. } = machine(Forwards::Within, Forwards::Never, true);
    let (registry, memory) = window(gpu[0]);
    let unit = Unit::default();
    let mut client = PeerClient::new(disk, unit.clone());
    let at = client.map(&topology, &memory, pages(3, 5), true).unwrap();
    let place = VaRange::of_pages(Vpn::new(4099), PageCount::new(5)).unwrap();
    assert_eq!(
        (at, unit.0.lock().unwrap().as_slice()),
        (DmaAddr::new(0xf000_0000 + 4099 * 4096), &[place][..])
    );
    client.map(&topology, &memory, pages(20, 1), true).unwrap();
    let full = client.map(&topology, &memory, pages(30, 1), true);
    assert_eq!(full, Err(PeerError::Iommu(pages(30, 1), IommuError::Full)));
    assert_eq!(memory.map.count(Pfn::new(30)), 0, "what is not mapped is not held");
    drop(client);
    assert!(unit.0.lock().unwrap().is_empty() && memory.map.live().is_zero());
    let mut client = PeerClient::new(disk, unit);
    let nowhere = PeerMemory { mapped: None, ..memory.clone() };
    assert_eq!(client.map(&topology, &nowhere, pages(3, 5), true), Err(PeerError::NotMapped(pages(3, 5))));
    registry.unregister(&memory.map, &mut |_| false).unwrap();
}

#[test]
fn pages_that_are_no_devices_on_a_bus_are_refused() {
    let Machine { topology, gpu, disk, alone, .. } = machine(Forwards::Never, Forwards::Never, false);
    let (registry, memory) = window(gpu[0]);
    let range = PfnRange::new(Pfn::new(CHUNK_PAGES as u64 * 4), PageCount::new(CHUNK_PAGES));
    let dax = registry.register(Pagemap::builder("dax0.0", MemoryType::Generic).range(range)).unwrap();
    let mut client = PeerClient::new(disk, Unit::default());
    let dax = PeerMemory { map: dax, ..memory.clone() };
    assert_eq!(client.map(&topology, &dax, range, true), Err(PeerError::NotPeer(MemoryType::Generic)));
    let far = PeerClient::new(alone, Unit::default()).map(&topology, &memory, pages(0, 1), true);
    assert!(matches!(far, Err(PeerError::Unreachable(_))), "{far:?}");
    let past = client.map(&topology, &memory, pages(2 * CHUNK_PAGES as u64 - 1, 2), true);
    assert!(matches!(past, Err(PeerError::Page(PageError::Outside(_)))), "{past:?}");
    assert!(memory.map.live().is_zero());
}
