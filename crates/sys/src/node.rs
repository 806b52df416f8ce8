//! Memory nodes: where the frames of a range come from.
//!
//! What     [`bind`], the kernel's `mbind` with `MPOL_BIND`.
//! Why      memory of a device that is a node of its own (CXL, a GPU with a coherent link) is had by asking for that node.
//! Owns     nothing. The policy goes with the mapping.
//! Fails    with the kernel's error: there is no such node, or this process may not use it.

use rustix::io::Errno;
use uhmm_addr::VaRange;

use crate::thread::raw;

/// Nodes that the kernel can be told of.
const NODES: usize = 1024;
const MPOL_BIND: usize = 2;

/// Has frames for pages of `range` that are yet to be there come from memory node `node`, and from nowhere else.
pub fn bind(range: VaRange, node: u32) -> Result<(), Errno> {
    let node = node as usize;
    if node >= NODES {
        return Err(Errno::INVAL);
    }
    let mut nodes = [0_u64; NODES / 64];
    nodes[node / 64] = 1 << (node % 64);
    // The kernel reads one bit less than it is told.
    let args = [range.start().get(), range.bytes(), MPOL_BIND, nodes.as_ptr() as usize, NODES + 1, 0];
    // SAFETY: the kernel reads `nodes`, which lives across the call, and changes where pages of the range will come
    // from: no byte of memory changes, whosever it is.
    unsafe { raw::syscall(linux_raw_sys::general::__NR_mbind, args) }.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;

    #[test]
    fn a_range_is_bound_to_a_node_that_exists() {
        let mapping = Mapping::reserve(4 << 12, "uhmm-test").unwrap();
        match bind(mapping.range(), 0) {
            Ok(()) => mapping.populate().unwrap(),
            // A kernel without NUMA.
            Err(errno) => assert_eq!(errno, Errno::NOSYS),
        }
        for node in [1000, u32::MAX] {
            assert!(bind(mapping.range(), node).is_err());
        }
    }
}
