/* One program for each way to start, to end, and to change mappings. Every page it writes says where it is and
 * which round wrote it; a page that reads otherwise ends the program with code 3. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define MIB (1UL << 20)

extern char **environ;
static char *self;

static void say(const char *text) {
    if (write(1, text, strlen(text)) < 0) _exit(4);
}

static void fail(const char *what, size_t page, uint64_t found, uint64_t wanted) {
    char text[200];
    int len = snprintf(text, sizeof text, "%s: pid %d page %zu is %llx, not %llx (errno %d)\n", what, getpid(),
                       page, (unsigned long long)found, (unsigned long long)wanted, errno);
    if (write(2, text, len) < 0) _exit(4);
    _exit(3);
}

static void *map(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) fail("mmap", 0, 0, 0);
    return at;
}

static uint64_t mark(size_t page, uint64_t round) { return (page + 1) * 0x9e3779b97f4a7c15UL ^ round; }

static void fill(uint64_t *at, size_t pages, uint64_t round) {
    for (size_t n = 0; n < pages; n++)
        for (size_t w = 0; w < WORDS; w += 64) at[n * WORDS + w] = mark(n, round) + w;
}

/* `first` is the number of the first page in what was filled. */
static void check_from(const char *what, uint64_t *at, size_t first, size_t pages, uint64_t round) {
    for (size_t n = 0; n < pages; n++)
        for (size_t w = 0; w < WORDS; w += 64)
            if (at[n * WORDS + w] != mark(first + n, round) + w)
                fail(what, first + n, at[n * WORDS + w], mark(first + n, round) + w);
}

static void check(const char *what, uint64_t *at, size_t pages, uint64_t round) {
    check_from(what, at, 0, pages, round);
}

static void check_zero(const char *what, uint64_t *at, size_t pages) {
    for (size_t n = 0; n < pages; n++)
        for (size_t w = 0; w < WORDS; w += 64)
            if (at[n * WORDS + w]) fail(what, n, at[n * WORDS + w], 0);
}

static void joined(pid_t child) {
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child) fail("waitpid", 0, 0, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) fail("child", 0, status, 0);
}

#define PAGES (40 * MIB / PAGE)

/* Until some page is away: on a busy machine the program may be done before its evictor had a turn. */
static void wait_for_eviction(uint64_t *at, size_t pages) {
    static unsigned char there[PAGES];
    for (int n = 0; n < 10000; n++) {
        size_t away = 0;
        if (mincore(at, pages * PAGE, there)) fail("mincore", 0, 0, 0);
        for (size_t page = 0; page < pages; page++) away += !(there[page] & 1);
        if (away) return;
        usleep(1000);
    }
}

static void fork_both(void) {
    uint64_t *at = map(PAGES * PAGE);
    fill(at, PAGES, 1);
    pid_t child = fork();
    if (child == 0) {
        check("child", at, PAGES, 1);
        fill(at, PAGES, 2);
        check("child again", at, PAGES, 2);
        _exit(0);
    }
    fill(at, PAGES / 2, 3);
    check("parent", at, PAGES / 2, 3);
    check_from("parent's rest", at + PAGES / 2 * WORDS, PAGES / 2, PAGES - PAGES / 2, 1);
    joined(child);
    check("parent after", at, PAGES / 2, 3);
    say("both\n");
}

/* The parent exits at once; the child goes on, forks again, and says so when all is well. */
static void daemonise(int close_all) {
    uint64_t *at = map(PAGES * PAGE);
    fill(at, PAGES, 1);
    if (fork()) _exit(0);
    setsid();
    if (close_all && syscall(SYS_close_range, 3, ~0U, 0)) fail("close_range", 0, 0, 0);
    if (fork()) _exit(0);
    check("daemon", at, PAGES, 1);
    fill(at, PAGES, 2);
    check("daemon again", at, PAGES, 2);
    say("daemon\n");
}

static void nested(int depth, uint64_t *at) {
    check("nested", at, PAGES, depth);
    fill(at, PAGES, depth + 1);
    if (depth < 4) {
        pid_t child = fork();
        if (child == 0) {
            nested(depth + 1, at);
            _exit(0);
        }
        joined(child);
    }
    check("nested after", at, PAGES, depth + 1);
}

static void many(void) {
    uint64_t *at = map(PAGES * PAGE);
    fill(at, PAGES, 1);
    for (int round = 0; round < 12; round++) {
        pid_t child = fork();
        if (child == 0) {
            check_from("one of many", at + round * 100 * WORDS, round * 100, 100, 1);
            _exit(0);
        }
        joined(child);
    }
    pid_t children[6];
    for (int n = 0; n < 6; n++)
        if ((children[n] = fork()) == 0) {
            fill(at, PAGES / 8, n);
            check("one of six", at, PAGES / 8, n);
            _exit(0);
        }
    for (int n = 0; n < 6; n++) joined(children[n]);
    check("many", at, PAGES, 1);
    say("many\n");
}

static void starts(void) {
    uint64_t *at = map(PAGES * PAGE);
    fill(at, PAGES, 1);
    say("system: ");
    if (system("echo shell") != 0) fail("system", 0, 0, 0);
    pid_t child = fork();
    if (child == 0) {
        execlp("echo", "echo", "exec", NULL);
        _exit(9);
    }
    joined(child);
    char *arguments[] = {"echo", "spawn", NULL};
    if (posix_spawnp(&child, "echo", NULL, NULL, arguments, environ)) fail("posix_spawn", 0, 0, 0);
    joined(child);
    if ((child = vfork()) == 0) {
        execlp("echo", "echo", "vfork", NULL);
        _exit(9);
    }
    joined(child);
    FILE *pipe = popen("cat", "w");
    fputs("popen\n", pipe);
    if (pclose(pipe)) fail("pclose", 0, 0, 0);
    check("starts", at, PAGES, 1);
    execl(self, self, "both", NULL);
    fail("exec", 0, 0, 0);
}

static void raw_fork(void) {
    uint64_t *at = map(PAGES * PAGE);
    fill(at, PAGES, 1);
    pid_t child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        check("raw child", at, PAGES, 1);
        fill(at, PAGES, 2);
        check("raw child again", at, PAGES, 2);
        _exit(0);
    }
    joined(child);
    check("raw parent", at, PAGES, 1);
    say("raw\n");
}

static void mappings(void) {
    uint64_t *at = map(PAGES * PAGE), *other = map(PAGES * PAGE);
    fill(at, PAGES, 1);
    fill(other, PAGES, 2);
    /* Discards come back as zeros. */
    size_t tenth = PAGES / 10;
    madvise(at, tenth * PAGE, MADV_DONTNEED);
    check_zero("DONTNEED", at, tenth);
    fill(at, tenth, 1);
    check("around DONTNEED", at, PAGES, 1);
    madvise(at, tenth * PAGE, MADV_FREE);
    for (size_t n = 0; n < tenth; n++) {
        uint64_t word = at[n * WORDS + 64];
        if (word && word != mark(n, 1) + 64) fail("FREE", n, word, mark(n, 1) + 64);
    }
    fill(at, tenth, 1);
    /* Discarded by a call that nobody sees, and used again at once. */
    for (int round = 0; round < 200; round++) {
        size_t page = round * 37 % (PAGES - 16);
        syscall(SYS_madvise, at + page * WORDS, 16 * PAGE, MADV_DONTNEED);
        check_zero("raw DONTNEED", at + page * WORDS, 16);
        for (size_t n = page; n < page + 16; n++)
            for (size_t w = 0; w < WORDS; w += 64) at[n * WORDS + w] = mark(n, 1) + w;
    }
    check("after raw DONTNEED", at, PAGES, 1);
    /* Unmapped in the middle, and mapped anew. */
    munmap(at + tenth * WORDS, tenth * PAGE);
    void *again = mmap(at + tenth * WORDS, tenth * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (again == MAP_FAILED) fail("mmap anew", 0, 0, 0);
    check_zero("mapped anew", again, tenth);
    /* Mapped over. */
    mmap(at + 2 * tenth * WORDS, tenth * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
         0);
    check_zero("mapped over", at + 2 * tenth * WORDS, tenth);
    check_from("around", at + 3 * tenth * WORDS, 3 * tenth, PAGES - 3 * tenth, 1);
    /* Moved, grown and shrunk. */
    uint64_t *moved = mremap(other, PAGES * PAGE, PAGES * PAGE + MIB, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) fail("mremap", 0, 0, 0);
    check("moved", moved, PAGES, 2);
    check_zero("grown", moved + PAGES * WORDS, MIB / PAGE);
    uint64_t *place = map(PAGES * PAGE);
    moved = mremap(moved, PAGES * PAGE + MIB, PAGES * PAGE, 0);
    moved = mremap(moved, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
    if (moved != place) fail("mremap to", 0, 0, 0);
    check("moved to", moved, PAGES, 2);
    /* Protected, and written through the kernel. */
    mprotect(moved, PAGES * PAGE, PROT_READ);
    check("read-only", moved, PAGES, 2);
    mprotect(moved, tenth * PAGE, PROT_NONE);
    mprotect(moved, PAGES * PAGE, PROT_READ | PROT_WRITE);
    check("writable", moved, PAGES, 2);
    mlock(moved, tenth * PAGE);
    check("locked", moved, PAGES, 2);
    munlock(moved, tenth * PAGE);
    int pipes[2];
    if (pipe(pipes)) fail("pipe", 0, 0, 0);
    for (size_t n = 0; n < PAGES; n += 61) {
        if (write(pipes[1], moved + n * WORDS, PAGE) != PAGE) fail("write", n, 0, 0);
        if (read(pipes[0], at + n * WORDS, PAGE) != PAGE) fail("read", n, 0, 0);
        check_from("through a pipe", at + n * WORDS, n, 1, 2);
    }
    char *heap = NULL;
    for (size_t size = PAGE; size <= 8 * MIB; size *= 2) {
        heap = realloc(heap, size);
        memset(heap + size / 2, 7, size / 2);
    }
    for (size_t n = PAGE; n < 8 * MIB; n++)
        if (heap[n] != 7) fail("realloc", n, heap[n], 7);
    say("mappings\n");
}

static uint64_t *theirs;

static void *later(void *arg) {
    (void)arg;
    for (int round = 1; round < 4; round++) {
        fill(theirs, PAGES, round);
        check("thread", theirs, PAGES, round);
    }
    say("thread\n");
    return NULL;
}

static void main_exits(void) {
    pthread_t thread;
    theirs = map(PAGES * PAGE);
    pthread_create(&thread, NULL, later, NULL);
    pthread_exit(NULL);
}

/* Threads come and go while another forks. */
static void *brief(void *arg) {
    uint64_t own[WORDS * 4];
    memset(own, 1, sizeof own);
    uint64_t *heap = malloc(200000);
    memset(heap, (int)(uintptr_t)arg, 200000);
    uint64_t sum = heap[100] + own[99];
    free(heap);
    return (void *)(uintptr_t)sum;
}

static void *churn(void *arg) {
    (void)arg;
    for (int n = 0; n < 400; n++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, brief, (void *)1)) fail("pthread_create", n, 0, 0);
        void *sum;
        pthread_join(thread, &sum);
        if ((uintptr_t)sum != 0x0202020202020202) fail("sum", n, (uintptr_t)sum, 0);
    }
    return NULL;
}

static void threads_and_forks(void) {
    uint64_t *at = map(PAGES * PAGE);
    pthread_t churning;
    fill(at, PAGES, 1);
    pthread_create(&churning, NULL, churn, NULL);
    for (int round = 0; round < 10; round++) {
        pid_t child = fork();
        if (child == 0) {
            check_from("child of threads", at + round * 500 * WORDS, round * 500, 500, 1);
            _exit(0);
        }
        check_from("between forks", at + round * 300 * WORDS, round * 300, 300, 1);
        joined(child);
    }
    pthread_join(churning, NULL);
    check("threads and forks", at, PAGES, 1);
    say("threads and forks\n");
}

static volatile sig_atomic_t signals;
static void on_signal(int signal) {
    (void)signal;
    signals++;
}

static void under_signals(void) {
    uint64_t *at = map(PAGES * PAGE);
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGALRM, &action, NULL);
    ualarm(1000, 1000);
    for (int round = 1; round < 4; round++) {
        fill(at, PAGES, round);
        check("under signals", at, PAGES, round);
    }
    ualarm(0, 0);
    if (!signals) fail("no signals", 0, 0, 1);
    say("signals\n");
}

int main(int count, char **arguments) {
    self = "/proc/self/exe";
    const char *what = count > 1 ? arguments[1] : "";
    if (!strcmp(what, "both")) fork_both();
    if (!strcmp(what, "daemon")) daemonise(0);
    if (!strcmp(what, "closing-daemon")) daemonise(1);
    if (!strcmp(what, "nested")) {
        uint64_t *at = map(PAGES * PAGE);
        fill(at, PAGES, 0);
        nested(0, at);
        say("nested\n");
    }
    if (!strcmp(what, "many")) many();
    if (!strcmp(what, "starts")) starts();
    if (!strcmp(what, "raw")) raw_fork();
    if (!strcmp(what, "mappings")) mappings();
    if (!strcmp(what, "main-exits")) main_exits();
    if (!strcmp(what, "threads-and-forks")) threads_and_forks();
    if (!strcmp(what, "signals")) under_signals();
    if (!strcmp(what, "exit")) {
        uint64_t *at = map(PAGES * PAGE);
        fill(at, PAGES, 1);
        check("before the end", at, PAGES, 1);
        wait_for_eviction(at, PAGES);
        if (atoi(arguments[2]) >= 0) _exit(atoi(arguments[2]));
        kill(getpid(), -atoi(arguments[2]));
        pause();
    }
    return 0;
}
