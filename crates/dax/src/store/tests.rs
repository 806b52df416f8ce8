//! The rules of tables, and labels at every step of every write.

use std::io;
use std::sync::Mutex;

use uhmm_addr::{ByteSize, Geometry};

use super::label::{COPY_BYTES, Label, LabelFault, VERSION, decode, encode};
use super::labels::AREA_BYTES;
use super::*;

const MIB: u64 = 1 << 20;

fn uuid(n: u8) -> Uuid {
    Uuid([n; 16])
}

/// A store of `mib` MiB, of 4K pages.
fn table(mib: u64) -> Table {
    Table::new(0, uuid(0), Geometry::K4, mib * MIB / 4096)
}

fn spec(mib: u64, align: Geometry) -> Spec {
    Spec { size: Some(ByteSize::mib(mib)), align: Some(align), ..Spec::default() }
}

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A change that may be refused.
fn some_change(table: &mut Table, numbers: &mut Numbers) {
    let aligns = [Geometry::K4, Geometry::M2];
    let id = NamespaceId(numbers.below(6) as u32);
    let align = aligns[numbers.below(2) as usize];
    let size = ByteSize::new((numbers.below(20) + 1) * align.bytes() as u64);
    let _ = match numbers.below(8) {
        0..3 => {
            let spec = Spec { size: Some(size), align: Some(align), mode: Mode::FsDax, name: "n".repeat(7) };
            table.create(&spec, uuid(numbers.below(256) as u8)).map(drop)
        }
        3 | 4 => table.resize(id, size),
        5 => table.destroy(id),
        6 => {
            let change = Change { align: Some(align), mode: Some(Mode::DevDax), name: Some("x".into()) };
            table.reconfigure(id, &change)
        }
        _ => {
            let bad = numbers.below(3) > 0;
            table.mark(id, numbers.below(600) * 4096, (numbers.below(5) + 1) * 4096, bad)
        }
    };
}

mod daxctl_create {
    //! The cases of ndctl's `test/daxctl-create.sh`.

    use super::*;

    fn extents(table: &Table, id: NamespaceId) -> usize {
        table.get(id).unwrap().extents.len()
    }

    #[test]
    fn test1_the_whole_space() {
        let mut table = table(64);
        let id = table.create(&Spec::default(), uuid(1)).unwrap();
        assert_eq!(extents(&table, id), 1);
        assert_eq!(table.get(id).unwrap().size(), ByteSize::mib(64));
        let full = table.create(&Spec::default(), uuid(2)).unwrap_err();
        assert_eq!(
            full.to_string(),
            "2 MiB is needed and 0 B is free at an alignment of 2M; ask for less, or destroy or shrink another namespace"
        );
        table.destroy(id).unwrap();
        assert_eq!(table.available(Geometry::M2).0.size(), ByteSize::mib(64));
    }

    #[test]
    fn test2_space_in_a_hole_and_at_the_end() {
        let mut table = table(64);
        let quarters: Vec<_> =
            (0..3).map(|n| table.create(&spec(16, Geometry::M2), uuid(n)).unwrap()).collect();
        table.destroy(quarters[1]).unwrap();
        let id = table.create(&spec(32, Geometry::M2), uuid(9)).unwrap();
        assert_eq!((id, extents(&table, id)), (quarters[1], 2), "the lowest number, and two ranges");
        assert!(table.available(Geometry::K4).0.is_zero());
    }

    #[test]
    fn test4_reconfigured_in_turns() {
        let mut table = table(64);
        let one = table.create(&spec(8, Geometry::M2), uuid(1)).unwrap();
        let two = table.create(&spec(8, Geometry::M2), uuid(2)).unwrap();
        for size in [16, 24, 32] {
            table.resize(one, ByteSize::mib(size)).unwrap();
            table.resize(two, ByteSize::mib(size)).unwrap();
        }
        assert_eq!((extents(&table, one), extents(&table, two)), (4, 4));
        assert!(table.available(Geometry::K4).0.is_zero());
    }

    #[test]
    fn test5_adjusted_at_the_end_and_not_at_the_beginning() {
        let mut table = table(64);
        let all: Vec<_> = (0..4).map(|n| table.create(&spec(16, Geometry::M2), uuid(n)).unwrap()).collect();
        table.destroy(all[0]).unwrap();
        table.destroy(all[3]).unwrap();
        table.resize(all[1], ByteSize::mib(32)).unwrap();
        assert_eq!(extents(&table, all[1]), 2, "the offsets of what it had stay");
        table.resize(all[2], ByteSize::mib(32)).unwrap();
        assert_eq!(extents(&table, all[2]), 1, "its last range has grown");
    }
}

#[test]
fn a_namespace_shrinks_from_its_end() {
    let mut table = table(64);
    let id = table.create(&spec(16, Geometry::M2), uuid(1)).unwrap();
    let first = table.get(id).unwrap().extents[0];
    table.resize(id, ByteSize::mib(4)).unwrap();
    assert_eq!(table.get(id).unwrap().extents, [Extent { start: first.start, len: 1024 }]);
}

#[test]
fn what_cannot_be_is_refused_with_its_values() {
    let mut table = Table::new(0, uuid(0), Geometry::M2, 64 * MIB / 4096);
    let told = table.create(&spec(8, Geometry::K4), uuid(1)).unwrap_err().to_string();
    assert_eq!(told, "the store's pages are 2M, so that nothing in it can be aligned to 4K; ask for 2M");
    let size = Some(ByteSize::mib(3));
    let told = table.create(&Spec { size, ..Spec::default() }, uuid(1)).unwrap_err().to_string();
    assert!(told.starts_with("3145728 bytes") && told.contains("multiple of 2097152"), "{told}");
    let id = table.create(&spec(8, Geometry::M2), uuid(1)).unwrap();
    let change = Change { align: Some(Geometry::G1), ..Change::default() };
    let told = table.reconfigure(id, &change).unwrap_err().to_string();
    assert!(told.contains("0x0..0x800") && told.contains("1G"), "{told}");
    let told = table.mark(id, 8 << 20, 4096, true).unwrap_err().to_string();
    assert!(told.contains("8388608+4096") && told.contains("8 MiB"), "{told}");
    assert!(table.mark(id, 1, 4096, true).is_err() && table.mark(id, u64::MAX - 4095, 4096, true).is_err());
    assert_eq!(
        table.resize(NamespaceId(7), ByteSize::mib(2)),
        Err(TableError::Unknown { id: NamespaceId(7) })
    );
}

#[test]
fn bad_pages_outlive_their_namespace() {
    let mut table = table(64);
    let id = table.create(&spec(8, Geometry::M2), uuid(1)).unwrap();
    table.mark(id, 4 << 20, 8192, true).unwrap();
    assert_eq!(table.bad_of(table.get(id).unwrap()).runs(), [Extent { start: 1024, len: 2 }]);
    table.destroy(id).unwrap();
    let next = table.create(&spec(8, Geometry::M2), uuid(2)).unwrap();
    assert_eq!(table.bad_of(table.get(next).unwrap()).runs(), [Extent { start: 1024, len: 2 }]);
    table.mark(next, 4 << 20, 4096, false).unwrap();
    assert_eq!(table.bad().runs(), [Extent { start: 1025, len: 1 }]);
}

#[test]
fn random_tables_survive_their_labels() {
    let mut numbers = Numbers(7);
    let mut table = table(64);
    for sequence in 0..3000 {
        some_change(&mut table, &mut numbers);
        let label = Label { sequence, table: table.clone() };
        // Decoding checks every rule: a change that breaks one fails here.
        assert_eq!(decode(&encode(&label).unwrap()), Ok(label));
    }
}

#[test]
fn changed_bytes_are_never_a_panic_and_never_another_table() {
    let mut numbers = Numbers(3);
    let mut table = table(64);
    (0..40).for_each(|_| some_change(&mut table, &mut numbers));
    let bytes = encode(&Label { sequence: 1, table }).unwrap();
    for _ in 0..20_000 {
        let mut broken = bytes.clone();
        let at = numbers.below(bytes.len() as u64) as usize;
        broken[at] ^= 1 << numbers.below(8);
        assert!(decode(&broken).is_err());
        // With a checksum that fits, the rules must hold all the same.
        broken[24..28].fill(0);
        let length = u32::from_le_bytes(broken[12..16].try_into().unwrap()) as usize;
        if let Some(whole) = broken.get(..length).filter(|whole| whole.len() >= 28) {
            let sum = crc32fast::hash(whole).to_le_bytes();
            broken[24..28].copy_from_slice(&sum);
            if let Ok(label) = decode(&broken) {
                assert_eq!(decode(&encode(&label).unwrap()), Ok(label), "what is believed can be written");
            }
        }
    }
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).is_err());
    }
}

/// An area in memory that notes every write, and can be cut off at any.
#[derive(Debug, Default)]
struct Noted {
    bytes: Mutex<Vec<u8>>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Noted {
    fn over(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes), writes: Mutex::default() }
    }
}

impl Area for Noted {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.bytes.lock().unwrap()[at as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.bytes.lock().unwrap()[at as usize..][..bytes.len()].copy_from_slice(bytes);
        self.writes.lock().unwrap().push((at, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

fn blank() -> Vec<u8> {
    vec![0; AREA_BYTES as usize]
}

#[test]
fn a_write_that_stops_anywhere_leaves_the_old_state_or_the_new_one() {
    const SECTOR: usize = 512;
    let mut numbers = Numbers(11);
    let area = Noted::over(blank());
    let mut labels = Labels::format(&area, table(64)).unwrap();
    let mut torn = 0;
    for _ in 0..120 {
        let before = area.bytes.lock().unwrap().clone();
        let old = labels.table().clone();
        let mut new = old.clone();
        some_change(&mut new, &mut numbers);
        area.writes.lock().unwrap().clear();
        labels.write(&area, new.clone()).unwrap();
        let writes = area.writes.lock().unwrap().clone();
        assert_eq!(writes.len(), 1, "one write, then one sync");
        let (at, bytes) = &writes[0];
        let sectors = bytes.len().div_ceil(SECTOR);
        // Every prefix of sectors, every sector by itself missing, and random subsets.
        let kept: Vec<Vec<bool>> = (0..=sectors)
            .map(|end| (0..sectors).map(|n| n < end).collect())
            .chain((0..sectors).map(|gone| (0..sectors).map(|n| n != gone).collect()))
            .chain((0..8).map(|_| (0..sectors).map(|_| numbers.below(2) == 0).collect()))
            .collect();
        for kept in kept {
            let mut image = before.clone();
            for (n, part) in bytes.chunks(SECTOR).enumerate().filter(|(n, _)| kept[*n]) {
                image[*at as usize + n * SECTOR..][..part.len()].copy_from_slice(part);
            }
            let after = Noted::over(image);
            let mut found = Labels::read(&after).unwrap();
            let whole = kept.iter().all(|kept| *kept);
            torn += usize::from(!whole);
            if whole {
                assert_eq!(found.table(), &new);
            } else {
                assert!(found.table() == &old || found.table() == &new);
            }
            // And it goes on from there.
            let next = found.table().clone();
            found.write(&after, next.clone()).unwrap();
            assert_eq!(Labels::read(&after).unwrap().table(), &next);
        }
    }
    assert!(torn > 1000, "{torn} torn writes");
}

#[test]
fn the_first_labels_are_there_or_not() {
    let area = Noted::over(blank());
    let _ = Labels::format(&area, table(64)).unwrap();
    let writes = area.writes.lock().unwrap().clone();
    assert!(writes.len() == 1 && writes[0].1.len() <= 512, "one sector, which no crash tears");
}

#[test]
fn a_copy_that_is_broken_or_newer_is_passed_over() {
    let area = Noted::over(blank());
    let mut labels = Labels::format(&area, table(64)).unwrap();
    let old = labels.table().clone();
    let mut new = old.clone();
    new.create(&Spec::default(), uuid(1)).unwrap();
    labels.write(&area, new.clone()).unwrap();
    let second = COPY_BYTES;

    let mut broken = area.bytes.lock().unwrap().clone();
    broken[second + 70] ^= 1;
    let broken = Noted::over(broken);
    let mut found = Labels::read(&broken).unwrap();
    assert_eq!(found.table(), &old);
    assert!(matches!(found.other(), Some(LabelFault::Checksum { .. })));
    found.write(&broken, new.clone()).unwrap();
    assert_eq!(Labels::read(&broken).unwrap().table(), &new);

    let newer = Noted::over(newer_copy(area.bytes.lock().unwrap().clone(), second));
    let mut found = Labels::read(&newer).unwrap();
    assert_eq!(found.table(), &old);
    let told = found.write(&newer, new).unwrap_err().to_string();
    assert!(told.contains(&format!("version {}", VERSION + 1)), "{told}");
    assert!(newer.writes.lock().unwrap().is_empty(), "what a newer version wrote stays");
}

#[test]
fn beside_a_newer_label_nothing_is_made_zero() {
    use std::os::unix::fs::FileExt;
    let store = Store::memory(ByteSize::mib(64), None, 0).unwrap();
    let ids = [(); 2].map(|()| store.create_namespace(&spec(4, Geometry::K4)).unwrap());
    let mut bytes = blank();
    store.medium.labels().read(0, &mut bytes).unwrap();
    store.medium.labels().write(0, &newer_copy(bytes, COPY_BYTES)).unwrap();
    let file = std::fs::File::from(store.medium.fd().try_clone_to_owned().unwrap());
    let at = store.medium.offset(Extent { start: 2048, len: 1 });
    file.write_all_at(&[7], at).unwrap();
    let told = store.create_namespace(&spec(4, Geometry::K4)).unwrap_err().to_string();
    assert!(told.contains("a newer uhmm wrote"), "{told}");
    assert!(store.claim(ids[0]).is_err() && store.table().is_ok());
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    assert_eq!(byte, [7]);
}

/// An area whose writes are never safe.
#[derive(Debug)]
struct Unsafe(Noted);

impl Area for Unsafe {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.read(at, into)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write(at, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        Err(io::ErrorKind::Other.into())
    }
}

#[test]
fn a_label_that_could_not_be_made_safe_is_not_in_force() {
    let area = Noted::over(blank());
    let mut labels = Labels::format(&area, table(64)).unwrap();
    let mut new = labels.table().clone();
    new.create(&Spec::default(), uuid(1)).unwrap();
    let area = Unsafe(area);
    assert!(matches!(labels.write(&area, new), Err(LabelsError::Io(_))));
    assert_eq!(Labels::read(&area).unwrap().table(), &table(64));
}

#[test]
fn a_label_that_none_can_follow_is_refused() {
    let bytes = encode(&Label { sequence: u64::MAX, table: table(64) }).unwrap();
    assert_eq!(decode(&bytes), Err(LabelFault::Invalid("no label can follow it")));
}

#[test]
fn behind_the_last_number_nothing_is_written() {
    let area = Noted::over(blank());
    let last = u64::MAX - 1;
    area.write(0, &encode(&Label { sequence: last - 1, table: table(64) }).unwrap()).unwrap();
    let mut labels = Labels::read(&area).unwrap();
    labels.write(&area, table(64)).unwrap();
    assert_eq!(Labels::read(&area).unwrap().sequence(), last);
    let before = area.bytes.lock().unwrap().clone();
    let told = labels.write(&area, table(64)).unwrap_err().to_string();
    assert!(told.contains("the sequence 18446744073709551614"), "{told}");
    assert!(labels.changeable().is_err(), "and nothing is made zero before");
    assert!(*area.bytes.lock().unwrap() == before);
    assert_eq!(Labels::read(&area).unwrap().sequence(), last);
}

/// Makes the copy at `at` one of the next version, with a checksum that holds.
fn newer_copy(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let length = u32::from_le_bytes(bytes[at + 12..at + 16].try_into().unwrap()) as usize;
    bytes[at + 8..at + 12].copy_from_slice(&(VERSION + 1).to_le_bytes());
    bytes[at + 24..at + 28].fill(0);
    let sum = crc32fast::hash(&bytes[at..at + length]).to_le_bytes();
    bytes[at + 24..at + 28].copy_from_slice(&sum);
    bytes
}

#[test]
fn with_both_copies_bad_nothing_is_written() {
    let area = Noted::over(blank());
    let mut labels = Labels::format(&area, table(64)).unwrap();
    labels.write(&area, table(64)).unwrap();
    let good = area.bytes.lock().unwrap().clone();
    let mut both = good.clone();
    both[40] ^= 1;
    both[COPY_BYTES + 30] ^= 1;
    let mixed = newer_copy(both.clone(), COPY_BYTES);
    for bytes in [both, mixed] {
        let area = Noted::over(bytes.clone());
        assert!(matches!(Labels::read(&area), Err(LabelsError::Lost { .. })));
        assert!(matches!(Labels::format(&area, table(64)), Err(LabelsError::Lost { .. })), "never format");
        assert_eq!(*area.bytes.lock().unwrap(), bytes);
    }
    assert!(matches!(Labels::format(&Noted::over(good), table(64)), Err(LabelsError::Io(_))));
}

#[test]
fn full_labels_say_so_and_stay() {
    let area = Noted::over(blank());
    let mut labels = Labels::format(&area, table(1024)).unwrap();
    let mut long = labels.table().clone();
    let id = long.create(&Spec { align: Some(Geometry::K4), ..Spec::default() }, uuid(1)).unwrap();
    (0..9000).for_each(|n| long.mark(id, n * 8192, 4096, true).unwrap());
    let told = labels.write(&area, long).unwrap_err();
    assert!(matches!(told, LabelsError::TooLong(_)), "{told}");
    assert_eq!(Labels::read(&area).unwrap().table(), &table(1024));
}

#[test]
fn who_makes_space_zero_keeps_nobody_from_the_labels() {
    let store = Store::memory(ByteSize::mib(64), None, 0).unwrap();
    let id = store.create_namespace(&spec(4, Geometry::K4)).unwrap();
    // As another process has it that is in the middle of making a large namespace.
    let space = wait_for(&store.medium, SPACE_BYTE, filelock::Kind::Exclusive).ok().unwrap();
    let begun = Instant::now();
    store.mark(id, 0, 4096, true).unwrap();
    drop(store.claim(id).unwrap());
    assert_eq!(store.table().unwrap().bad().runs().len(), 1);
    store.destroy(id).unwrap();
    assert!(begun.elapsed() < PATIENCE);
    let told = store.create_namespace(&spec(4, Geometry::K4)).unwrap_err().to_string();
    assert!(
        told.starts_with("the store is being changed by process ") && told.contains("this one"),
        "{told}"
    );
    drop(space);
    store.create_namespace(&spec(4, Geometry::K4)).unwrap();
}

#[test]
fn space_that_is_another_s_is_put_nowhere() {
    let mut table = table(64);
    let id = table.create(&spec(8, Geometry::M2), uuid(1)).unwrap();
    let own = table.get(id).unwrap().clone();
    let taken = Extent { start: own.extents[0].start + 7, len: 1 };
    let other = Namespace { id: NamespaceId(5), extents: vec![taken], ..own.clone() };
    let behind = Namespace { extents: vec![Extent { start: table.capacity, len: 1 }], ..other.clone() };
    assert_eq!(table.put(other), Err(taken));
    assert!(table.put(behind).is_err());
    table.put(Namespace { name: "anew".into(), ..own }).unwrap();
    assert_eq!((table.namespaces().len(), table.get(id).unwrap().name.as_str()), (1, "anew"));
}

#[test]
fn many_bad_pages_are_mended_in_steps() {
    let store = Store::memory(ByteSize::mib(64), None, 0).unwrap();
    let id = store.create_namespace(&spec(48, Geometry::K4)).unwrap();
    store.mark(id, 4096, 40 << 20, true).unwrap();
    store.mark(id, 44 << 20, 4096, true).unwrap();
    let before = store.labels.lock().unwrap().sequence();
    let all = (40 << 20) / 4096 + 1;
    assert_eq!(store.clear_error(id, 0, 48 << 20).unwrap().get(), all);
    let steps = store.labels.lock().unwrap().sequence() - before;
    assert_eq!(steps, (all as u64).div_ceil(STEP));
    assert!(store.table().unwrap().bad().runs().is_empty());
    assert!(store.clear_error(id, 0, 49 << 20).is_err());
}
