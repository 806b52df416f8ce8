use super::*;

#[test]
fn the_running_kernel_answers() {
    let found = probe();
    assert!(!found.kernel.is_empty() && found.cpus > 0);
    assert!(found.memory > ByteSize::mib(1));
    let rows = found.rows();
    for row in &rows {
        println!("{:<28} {:<5} {:<40} {:?}", row.name, row.have, row.detail, row.grant);
        assert!(!row.detail.is_empty() && !row.needed_for.is_empty());
        assert!(row.grant.is_none() || !row.have, "{row:?}");
    }
    if matches!(found.uffd, UffdAccess::Syscall | UffdAccess::DeviceNode) {
        assert!(rows[0].have && found.features.contains(Features::EVENT_UNMAP));
    }
}

#[test]
fn what_is_denied_names_one_command() {
    let mut found = probe();
    for (device, command) in [
        (Errno::ACCESS, "sudo setfacl -m u:$USER:rw /dev/userfaultfd"),
        (Errno::NOENT, "sudo sysctl vm.unprivileged_userfaultfd=1"),
    ] {
        found.uffd = UffdAccess::None { syscall: Errno::PERM, device };
        let row = &found.rows()[0];
        assert_eq!((row.have, row.grant.as_deref()), (false, Some(command)));
    }
}

#[test]
fn small_files_are_understood() {
    assert_eq!(chosen("always [madvise] never"), "madvise");
    assert_eq!(chosen("none"), "");
    assert_eq!(kib_line("MemTotal:       2048 kB\nSwapTotal: 0 kB", "MemTotal:"), ByteSize::mib(2));
    assert_eq!(kib_line("", "MemTotal:"), ByteSize::default());
}
