//! Which device sits behind which bridge, and how far two of them are apart.
//!
//! What    [`Topology`], a tree of host bridges, bridges and devices; [`Topology::path`], the kernel's
//!         `calc_map_type_and_dist`; [`Topology::closest`], its `pci_p2pmem_find_many`.
//! Fails   with [`Unreachable`], which says where the way ends.

use alloc::vec::Vec;

/// A device, or a bridge, of a topology.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerId(usize);

/// What a host does with a transfer from one device to another (the kernel's whitelist of host bridges, and
/// `cpu_supports_p2pdma`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Forwards {
    /// It may lose it.
    Never,
    /// It passes it on between devices of its own (`REQ_SAME_HOST_BRIDGE`).
    Within,
    /// It passes it on, to other host bridges that do as well.
    Anywhere,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Host(Forwards),
    /// A bridge sends transfers between devices below it up to be checked (ACS redirection), or does not.
    Bridge(bool),
    Device,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    above: Option<PeerId>,
    kind: Kind,
}

/// How a transfer gets from one device to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// Below the host, by addresses of the bus.
    Bus,
    /// Up to the host and down again, by addresses that the IOMMU translates.
    HostBridge,
}

/// The way between two devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Path {
    /// Steps up to where both ways meet, and down again: 0 for the same device, 2 for two functions behind one port, 4
    /// for two devices of one switch.
    pub distance: usize,
    /// How.
    pub route: Route,
}

/// No transfer gets from one to the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{provider:?} does not reach {client:?}: the way leads through the host, {distance} steps, which does not pass it on"
)]
pub struct Unreachable {
    /// Whose pages these are.
    pub provider: PeerId,
    /// Who would reach them.
    pub client: PeerId,
    /// How far they are apart.
    pub distance: usize,
}

/// A tree of buses.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    nodes: Vec<Node>,
}

impl Topology {
    /// Nothing.
    pub const fn new() -> Self {
        Self { nodes: Vec::new() }
    }

    fn add(&mut self, above: Option<PeerId>, kind: Kind) -> PeerId {
        self.nodes.push(Node { above, kind });
        PeerId(self.nodes.len() - 1)
    }

    /// A host bridge: the root of a tree.
    pub fn host(&mut self, forwards: Forwards) -> PeerId {
        self.add(None, Kind::Host(forwards))
    }

    /// A port or a bridge below another, or below a host bridge. `redirects`: it sends transfers between what is below
    /// it up (`pci_bridge_has_acs_redir`).
    pub fn bridge(&mut self, above: PeerId, redirects: bool) -> PeerId {
        self.add(Some(above), Kind::Bridge(redirects))
    }

    /// A device below a bridge or a host bridge.
    pub fn device(&mut self, above: PeerId) -> PeerId {
        self.add(Some(above), Kind::Device)
    }

    /// From a device up, the host bridge not among them.
    fn upwards(&self, from: PeerId) -> impl Iterator<Item = PeerId> {
        let below_host = |at: &PeerId| !matches!(self.nodes[at.0].kind, Kind::Host(_));
        core::iter::successors(Some(from), |at| self.nodes[at.0].above).take_while(below_host)
    }

    fn host_of(&self, device: PeerId) -> (PeerId, Forwards) {
        let mut at = device;
        loop {
            match (self.nodes[at.0].kind, self.nodes[at.0].above) {
                (Kind::Host(forwards), _) => return (at, forwards),
                (_, Some(above)) => at = above,
                (_, None) => return (at, Forwards::Never),
            }
        }
    }

    fn redirects(&self, at: PeerId) -> bool {
        matches!(self.nodes[at.0].kind, Kind::Bridge(true))
    }

    /// How pages of `provider` are reached by `client`.
    ///
    /// # Errors
    /// [`Unreachable`] if the way leads through a host that does not pass transfers on.
    ///
    /// # Panics
    /// If one of the two is of another topology.
    pub fn path(&self, provider: PeerId, client: PeerId) -> Result<Path, Unreachable> {
        let meets = |at: PeerId| self.upwards(client).position(|other| other == at);
        let met = self.upwards(provider).enumerate().find_map(|(up, at)| Some((up, meets(at)?)));
        let (distance, checked) = match met {
            Some((up, down)) => {
                // The bridge at which they meet counts as well, on the provider's side.
                let checked = self.upwards(provider).take(up + 1).chain(self.upwards(client).take(down));
                (up + down, checked.into_iter().any(|at| self.redirects(at)))
            }
            None => (self.upwards(provider).count() + self.upwards(client).count(), true),
        };
        if !checked {
            return Ok(Path { distance, route: Route::Bus });
        }
        let ((host, forwards), (other, others)) = (self.host_of(provider), self.host_of(client));
        let least = if host == other { Forwards::Within } else { Forwards::Anywhere };
        if forwards.min(others) < least {
            return Err(Unreachable { provider, client, distance });
        }
        Ok(Path { distance, route: Route::HostBridge })
    }

    /// The sum of the ways from `provider` to each of `clients` (`pci_p2pdma_distance_many`).
    ///
    /// # Errors
    /// If one of them cannot be reached.
    pub fn distance(&self, provider: PeerId, clients: &[PeerId]) -> Result<usize, Unreachable> {
        clients.iter().try_fold(0, |sum, client| Ok(sum + self.path(provider, *client)?.distance))
    }

    /// The provider that is closest to all of `clients`, and how far that is in all; `turn` chooses among several that
    /// are as close. `None` if none reaches all.
    pub fn closest(&self, providers: &[PeerId], clients: &[PeerId], turn: usize) -> Option<(PeerId, usize)> {
        let reached = || {
            let with = |provider: &PeerId| Some((*provider, self.distance(*provider, clients).ok()?));
            providers.iter().filter_map(with)
        };
        let least = reached().map(|(_, distance)| distance).min()?;
        let closest = || reached().filter(|(_, distance)| *distance == least);
        closest().nth(turn % closest().count())
    }
}
