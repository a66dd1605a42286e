/* A page of a file that nobody can read, and what an ordinary user can do with it.
 *
 *   fusehang DEVICE REPORT page|descriptor     DEVICE: a fuse device; REPORT: a file for what is done; the victim: descriptor 1
 *
 * In a user and mount namespace of its own this serves a FUSE file system with one file of one page.
 *   1. The page is read, and spliced into a pipe of our own while it is up to date.
 *   2. A write to it is refused by the server, so the kernel no longer takes it for up to date.
 *   3. A reader locks it, and the server does not answer that read.
 * Whoever now wants the page waits for its lock, and no signal ends that wait. "page": the page is moved from our pipe to
 * descriptor 1. "descriptor": the file is sent along with a byte there. The kernel ends all of it when the server dies.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile struct { int hold, held; } *shared;
static int device, report;

static void say(const char *format, ...) {
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (write(report, text, length) < 0)
        exit(2);
}

static void fail(const char *what) {
    say("failed: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void answer(unsigned long long unique, int error, void *data, size_t size) {
    struct fuse_out_header head = {.len = sizeof head + size, .error = error, .unique = unique};
    struct iovec parts[2] = {{&head, sizeof head}, {data, size}};
    if (writev(device, parts, size ? 2 : 1) < 0 && errno != ENOENT)
        exit(3);
}

static void describe(struct fuse_attr *attributes, unsigned long long node) {
    memset(attributes, 0, sizeof *attributes);
    attributes->ino = node;
    attributes->nlink = 1;
    attributes->mode = node == 1 ? S_IFDIR | 0755 : S_IFREG | 0666;
    attributes->size = node == 1 ? 0 : 4096;
}

static void serve(void) {
    static char buffer[1 << 20], page[4096];
    for (;;) {
        struct fuse_in_header *in = (void *)buffer;
        struct fuse_init_out init = {.major = FUSE_KERNEL_VERSION, .minor = 31, .max_write = 4096, .max_background = 16};
        struct fuse_attr_out attributes = {.attr_valid = 1000};
        struct fuse_entry_out entry = {.nodeid = 2, .entry_valid = 1000, .attr_valid = 1000};
        struct fuse_open_out opened = {.fh = 1, .open_flags = FOPEN_KEEP_CACHE};
        if (read(device, buffer, sizeof buffer) < 0) {
            if (errno == EINTR || errno == ENOENT)
                continue;
            exit(0);
        }
        switch (in->opcode) {
        case FUSE_INIT: answer(in->unique, 0, &init, sizeof init); break;
        case FUSE_GETATTR: describe(&attributes.attr, in->nodeid); answer(in->unique, 0, &attributes, sizeof attributes); break;
        case FUSE_LOOKUP: describe(&entry.attr, 2); answer(in->unique, 0, &entry, sizeof entry); break;
        case FUSE_OPEN: answer(in->unique, 0, &opened, sizeof opened); break;
        case FUSE_READ:
            if (shared->hold)
                shared->held = 1;
            else
                answer(in->unique, 0, page, sizeof page);
            break;
        case FUSE_WRITE: answer(in->unique, -EIO, 0, 0); break;
        case FUSE_RELEASE: case FUSE_FLUSH: answer(in->unique, 0, 0, 0); break;
        case FUSE_FORGET: case FUSE_BATCH_FORGET: case FUSE_INTERRUPT: break;
        default: answer(in->unique, -ENOSYS, 0, 0);
        }
    }
}

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        fail(path);
    close(fd);
}

static void mount_own(const char *path) {
    char text[100];
    unsigned uid = getuid(), gid = getgid();
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
        fail("no user namespace");
    put("/proc/self/setgroups", "deny");
    snprintf(text, sizeof text, "0 %u 1", uid);
    put("/proc/self/uid_map", text);
    snprintf(text, sizeof text, "0 %u 1", gid);
    put("/proc/self/gid_map", text);
    device = open(path, O_RDWR | O_CLOEXEC);
    if (device < 0)
        fail("no fuse device");
    if (mount("tmpfs", "/tmp", "tmpfs", 0, "") < 0 || mkdir("/tmp/m", 0700) < 0)
        fail("no mount");
    snprintf(text, sizeof text, "fd=%d,rootmode=40000,user_id=0,group_id=0", device);
    if (mount("x", "/tmp/m", "fuse", MS_NOSUID | MS_NODEV, text) < 0)
        fail("no fuse mount");
}

static void send_along(int file) {
    char byte = 'x', control[CMSG_SPACE(sizeof file)] = {0};
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof file);
    memcpy(CMSG_DATA(head), &file, sizeof file);
    ssize_t sent = sendmsg(1, &message, MSG_NOSIGNAL);
    say("done: %s\n", sent < 0 ? strerror(errno) : "sent");
}

int main(int count, char **words) {
    int own[2];
    char byte = 'x';
    if (count != 4)
        return 2;
    report = open(words[2], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    shared = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (report < 0 || shared == MAP_FAILED || pipe2(own, O_CLOEXEC) < 0)
        return 2;
    mount_own(words[1]);
    pid_t parent = getpid();
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent)
            serve();
        _exit(0);
    }
    close(device); /* the server's alone: its end is the end of the file system */
    int file = open("/tmp/m/f", O_RDWR | O_CLOEXEC);
    off_t start = 0;
    if (file < 0 || splice(file, &start, own[1], 0, 1, 0) != 1)
        fail("no page");
    if (pwrite(file, &byte, 1, 0) >= 0)
        fail("the write was not refused");
    shared->hold = 1;
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        _exit(pread(file, &byte, 1, 0) < 0);
    }
    for (int tries = 0; !shared->held && tries < 500; tries++)
        usleep(10000);
    if (!shared->held)
        fail("no read came");
    usleep(100000);
    say("held\n");
    if (!strcmp(words[3], "page")) {
        ssize_t moved = splice(own[0], 0, 1, 0, 1, SPLICE_F_NONBLOCK);
        say("done: %s\n", moved < 0 ? strerror(errno) : "moved");
    } else {
        send_along(file);
        close(file);
    }
    for (;;)
        pause();
}
