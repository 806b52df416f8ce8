use rustix::mm::MprotectFlags;

use super::*;
use crate::uffd::tests::Memory;

/// Pages: two writable, one read-only, one not to be touched, one that is not there, one writable.
fn mixed() -> Memory {
    let memory = Memory::new(6);
    // SAFETY: pages of this mapping, which nobody touches; the memory minds no hole.
    unsafe {
        rustix::mm::mprotect(memory.at(2).cast(), 4096, MprotectFlags::READ).unwrap();
        rustix::mm::mprotect(memory.at(3).cast(), 4096, MprotectFlags::empty()).unwrap();
        rustix::mm::munmap(memory.at(4).cast(), 4096).unwrap();
    }
    memory
}

fn expected(memory: &Memory) -> [Rights; 4] {
    let rights = |first, pages, read, write| Rights {
        range: memory.part(first, pages),
        read,
        write,
        shared: false,
        file: false,
    };
    [
        rights(0, 2, true, true),
        rights(2, 1, true, false),
        rights(3, 1, false, false),
        rights(5, 1, true, true),
    ]
}

#[test]
fn every_mapping_of_a_range_and_no_other() {
    let memory = mixed();
    let rights = MappingRights::open().unwrap();
    let unused = Rights { range: memory.part(0, 1), read: false, write: false, shared: false, file: false };
    for fallback in [false, true] {
        rights.fallback.store(fallback, Ordering::Relaxed);
        let mut found = [unused; 8];
        let (count, end) = rights.list(memory.range(), &mut found).unwrap();
        assert_eq!((count, end), (4, memory.range().end_page()), "{fallback}");
        assert_eq!(found[..4], expected(&memory));
        let (count, _) = rights.list(memory.part(1, 2), &mut found).unwrap();
        assert_eq!((count, found[0].range, found[1].range), (2, memory.part(1, 1), memory.part(2, 1)));
        assert_eq!(rights.list(memory.part(4, 1), &mut found).unwrap().0, 0);
    }
}

#[test]
fn a_list_goes_on_where_the_room_ended() {
    let memory = mixed();
    let rights = MappingRights::open().unwrap();
    for fallback in [false, true] {
        rights.fallback.store(fallback, Ordering::Relaxed);
        let mut all = Vec::new();
        let mut rest = Some(memory.range());
        while let Some(part) = rest {
            let mut found = [Rights { range: part, read: false, write: false, shared: false, file: false }];
            let (count, end) = rights.list(part, &mut found).unwrap();
            all.extend_from_slice(&found[..count]);
            assert!(end > part.first(), "no progress");
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
        assert_eq!(all, expected(&memory), "{fallback}");
    }
}

#[test]
fn mappings_have_names_and_files() {
    let memory = mixed();
    let file = crate::mapping::Mapping::reserve(4096, "uhmm-test").unwrap();
    let rights = MappingRights::open().unwrap();
    for fallback in [false, true] {
        rights.fallback.store(fallback, Ordering::Relaxed);
        let mut found = Vec::new();
        let list = |entry: MapEntry<'_>| {
            assert!(entry.inode == 0 && !entry.shared && !entry.exec);
            found.push((entry.range.intersect(memory.range()).unwrap(), entry.read, entry.write));
        };
        rights.entries(memory.range(), list).unwrap();
        let expected = expected(&memory).map(|rights| (rights.range, rights.read, rights.write));
        assert_eq!(found, expected, "{fallback}");
        let mut named = 0;
        rights
            .entries(file.range(), |entry| {
                // Without CONFIG_ANON_VMA_NAME there are no names.
                assert!(entry.path.is_empty() || entry.path == b"[anon:uhmm-test]", "{entry:?}");
                named += 1;
            })
            .unwrap();
        assert_eq!(named, 1);
        let code = VirtAddr::of(mappings_have_names_and_files as fn() as *const u8).page();
        let mut program = Vec::new();
        let list = |entry: MapEntry<'_>| program.push((entry.exec, entry.inode != 0, entry.path.to_vec()));
        rights.entries(VaRange::page(code), list).unwrap();
        let path = std::env::current_exe().unwrap();
        assert_eq!(program, [(true, true, path.into_os_string().into_encoded_bytes())]);
    }
}
