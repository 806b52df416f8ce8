//! The IOMMU of VFIO (type 1), as uhmm's [`Iommu`].
//!
//! What     [`Type1`], over a container that its user has set up: with a group attached, and `VFIO_TYPE1v2_IOMMU` chosen.
//! Why      it is how a driver in user space has a device reach its memory. The kernel pins what it maps; a mirror
//!          whose table this is takes it back before pages move, so that both can be had.
//! Owns     the container. What is mapped stays mapped until it is closed or taken back.
//! Whose    a container has one address space. Device addresses are those of a window that the caller chooses: the
//!          first page of the mirrored range lies at its beginning, the others where they follow.
//! Fails    as [`IommuError`] says: VFIO has a limit of mappings (`dma_entry_limit`, 65535), and counts them against
//!          `RLIMIT_MEMLOCK`. Taking back what was mapped does not fail: VFIO unmaps whole mappings, and these are.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use uhmm_addr::{DmaAddr, VaRange, Vpn};
use uhmm_core::dma::{Iommu, IommuError};

const GROUP: u8 = b';';
const MAP_DMA: Opcode = opcode::none(GROUP, 113);
const UNMAP_DMA: Opcode = opcode::none(GROUP, 114);
const READ: u32 = 1;
const WRITE: u32 = 2;

/// `struct vfio_iommu_type1_dma_map`
#[repr(C)]
#[derive(Clone, Copy)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`, without a bitmap behind it.
#[repr(C)]
#[derive(Clone, Copy)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

const _: () = assert!(size_of::<DmaMap>() == 32 && size_of::<DmaUnmap>() == 24);

/// A VFIO container, as the IOMMU of a mirror.
#[derive(Debug)]
pub struct Type1 {
    container: OwnedFd,
    first: Vpn,
    window: DmaAddr,
}

impl Type1 {
    /// `container` for a mirror of `range`, whose first page the device finds at `window`.
    ///
    /// # Safety
    /// The devices of the container must be told to write nothing of `range` to which Rust references exist: they
    /// reach it without asking.
    pub const unsafe fn new(container: OwnedFd, range: VaRange, window: DmaAddr) -> Self {
        Self { container, first: range.first(), window }
    }

    fn addr(&self, pages: VaRange) -> DmaAddr {
        self.window.forward(pages.first().since(self.first))
    }
}

const fn refusal(errno: Errno) -> IommuError {
    match errno {
        Errno::NOSPC => IommuError::Full,
        Errno::NOMEM => IommuError::NoMemory,
        Errno::INVAL | Errno::EXIST => IommuError::OutOfWindow,
        other => IommuError::Refused(other.raw_os_error()),
    }
}

impl Iommu for Type1 {
    fn map(&mut self, pages: VaRange, write: bool) -> Result<DmaAddr, IommuError> {
        let addr = self.addr(pages);
        let request = DmaMap {
            argsz: size_of::<DmaMap>() as u32,
            flags: if write { READ | WRITE } else { READ },
            vaddr: pages.start().get() as u64,
            iova: addr.get(),
            size: pages.bytes() as u64,
        };
        // SAFETY: the request is the structure of its number. The device reaches the pages from here on, for which
        // whoever made this value answers.
        unsafe { ioctl(self.container.as_fd(), Setter::<MAP_DMA, DmaMap>::new(request)) }.map_err(refusal)?;
        Ok(addr)
    }

    fn unmap(&mut self, pages: VaRange) {
        let mut request = DmaUnmap {
            argsz: size_of::<DmaUnmap>() as u32,
            flags: 0,
            iova: self.addr(pages).get(),
            size: pages.bytes() as u64,
        };
        // SAFETY: the request is the structure of its number, in which the kernel writes how much it unmapped.
        let done =
            unsafe { ioctl(self.container.as_fd(), Updater::<UNMAP_DMA, DmaUnmap>::new(&mut request)) };
        debug_assert!(done.is_ok() && request.size == pages.bytes() as u64, "what was mapped at once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_addr::{PageCount, VirtAddr};

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!((MAP_DMA, UNMAP_DMA), (0x3b71, 0x3b72));
    }

    #[test]
    fn what_is_no_container_says_so() {
        let range = VaRange::new(VirtAddr::new(0x7000_0000), 8 * 4096).unwrap();
        let window = DmaAddr::new(0x10_0000);
        let file = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: there is no device.
        let mut type1 = unsafe { Type1::new(file.into(), range, window) };
        let part = VaRange::of_pages(range.first().forward(PageCount::new(3)), PageCount::ONE).unwrap();
        assert_eq!(type1.addr(part), window.forward(PageCount::new(3)));
        assert_eq!(type1.map(part, true), Err(IommuError::Refused(Errno::NOTTY.raw_os_error())));
    }

    #[test]
    fn each_refusal_says_what_would_help() {
        for (errno, why) in [
            (Errno::NOSPC, IommuError::Full),
            (Errno::NOMEM, IommuError::NoMemory),
            (Errno::EXIST, IommuError::OutOfWindow),
            (Errno::INVAL, IommuError::OutOfWindow),
            (Errno::FAULT, IommuError::Refused(14)),
        ] {
            assert_eq!(refusal(errno), why);
        }
    }
}
