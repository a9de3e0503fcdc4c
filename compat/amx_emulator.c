/* Intel's AMX for CPUs without it, to be preloaded: LD_PRELOAD=libamx_emulator.so python ...

The CPU raises SIGILL at each instruction; the handler does what Intel's manual says and goes on
behind it. Only what kernels/tiles.mojo uses is known. Three functions of libc are replaced: open
shows /proc/cpuinfo with the features added, syscall grants the tile registers, and sigaction
leaves the handler in its place. AMX_EMULATOR=refuse grants nothing, AMX_EMULATOR=wrong adds one
to a sum of each product: for tests of what must happen then.

Build: cc -O2 -mavx512f -shared -fPIC -o libamx_emulator.so amx_emulator.c -ldl
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define ROWS 16
#define WORDS 16 /* 32-bit words in a row */
#define HERE __thread __attribute__((tls_model("initial-exec")))

static HERE uint32_t tiles[8][ROWS][WORDS];
static HERE int configured;
static int wrong, refused;
static unsigned long executed;

/* General registers in the order of their encoding. */
static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};

static void fail(const char *why)
{
    (void)!write(2, "amx_emulator: ", 14);
    (void)!write(2, why, strlen(why));
    (void)!write(2, "\n", 1);
    _exit(132);
}

/* Only full tiles: what kernels/tiles.mojo configures. */
static void configure(const uint8_t *config)
{
    if (config[0] != 1 || config[1] != 0)
        fail("another palette or first row than 1 and 0");
    for (int i = 0; i < 8; i++)
        if (config[48 + i] != ROWS || config[16 + 2 * i] != 4 * WORDS || config[17 + 2 * i])
            fail("a tile that is not 16 rows of 64 bytes");
    memset(tiles, 0, sizeof tiles);
    configured = 1;
}

/* TDPBF16PS: even and odd numbers are added up separately, fused, then both and the old sum. */
static void multiply_bf16(int to, int a, int b)
{
    unsigned state = _mm_getcsr();
    _mm_setcsr(0x9fc0); /* to nearest even, denormals are zero, in and out; no traps */
    __asm__ volatile("" ::: "memory");
    for (int m = 0; m < ROWS; m++) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < WORDS; k++) {
            uint32_t pair = tiles[a][m][k];
            __m512i line = _mm512_loadu_si512(tiles[b][k]);
            __m512 first = _mm512_castsi512_ps(_mm512_set1_epi32(pair << 16));
            __m512 second = _mm512_castsi512_ps(_mm512_set1_epi32(pair & 0xffff0000));
            __m512 left = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
            __m512 right = _mm512_castsi512_ps(
                _mm512_and_si512(line, _mm512_set1_epi32(0xffff0000)));
            even = _mm512_fmadd_ps(first, left, even);
            odd = _mm512_fmadd_ps(second, right, odd);
        }
        __m512 sum = _mm512_add_ps(_mm512_loadu_ps(tiles[to][m]), _mm512_add_ps(even, odd));
        _mm512_storeu_ps(tiles[to][m], sum);
    }
    __asm__ volatile("" ::: "memory");
    _mm_setcsr(state);
    if (wrong) {
        float sum;
        memcpy(&sum, tiles[to][0], 4);
        sum += 1;
        memcpy(tiles[to][0], &sum, 4);
    }
}

/* TDPBUSD: unsigned bytes of a by signed ones of b, exact but for overflow. */
static void multiply_bytes(int to, int a, int b)
{
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < WORDS; n++) {
            uint32_t sum = tiles[to][m][n];
            for (int k = 0; k < WORDS; k++)
                for (int i = 0; i < 32; i += 8)
                    sum += (uint32_t)((int32_t)(uint8_t)(tiles[a][m][k] >> i) *
                                      (int32_t)(int8_t)(tiles[b][k][n] >> i));
            tiles[to][m][n] = sum;
        }
    if (wrong)
        tiles[to][0][0] += 1;
}

/* Executes the instruction at `code`; returns its length, 0 if it is not one of AMX. */
static int execute(const uint8_t *code, const greg_t *registers)
{
    /* VEX, three bytes: C4, R X B and the map, W vvvv L and the prefix; then opcode, ModRM. */
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0)
        return 0;
    int prefix = code[2] & 3, opcode = code[3], modrm = code[4];
    int mod = modrm >> 6, reg = (modrm >> 3) & 7, rm = modrm & 7;
    int high_index = code[1] & 0x40 ? 0 : 8, high_base = code[1] & 0x20 ? 0 : 8;
    enum { NONE, P66, PF3, PF2 };

    if (opcode == 0x49 && prefix == NONE && modrm == 0xc0) {
        configured = 0;
        return 5;
    }
    if (opcode == 0x5c || opcode == 0x5e || opcode == 0x4b || (opcode == 0x49 && mod == 3))
        if (!configured)
            fail("a tile is used that is not configured");
    if (opcode == 0x49 && prefix == PF2 && mod == 3) {
        memset(tiles[reg], 0, sizeof tiles[reg]);
        return 5;
    }
    if (mod == 3 && opcode == 0x5c && prefix == PF3) {
        multiply_bf16(reg, rm, (~code[2] >> 3) & 7);
        return 5;
    }
    if (mod == 3 && opcode == 0x5e && prefix == P66) {
        multiply_bytes(reg, rm, (~code[2] >> 3) & 7);
        return 5;
    }
    if (mod == 3 || (opcode != 0x49 && opcode != 0x4b))
        return 0;

    /* An address: base, then perhaps SIB, then perhaps a displacement. */
    int length = 5, base = rm, stride = 0, has_sib = rm == 4, scale = 0;
    if (has_sib) {
        int sib = code[length++];
        base = sib & 7;
        stride = ((sib >> 3) & 7) | high_index;
        scale = sib >> 6;
    }
    if (mod == 0 && base == 5)
        fail("an address without a base");
    intptr_t address = registers[REGISTERS[base | high_base]];
    if (mod == 1)
        address += (int8_t)code[length++];
    if (mod == 2) {
        int32_t displacement;
        memcpy(&displacement, code + length, 4);
        address += displacement;
        length += 4;
    }
    if (opcode == 0x49 && prefix == NONE && reg == 0) {
        if (has_sib && stride != 4)
            address += registers[REGISTERS[stride]] << scale;
        configure((const uint8_t *)address);
        return length;
    }
    if (opcode != 0x4b || !has_sib || stride == 4)
        return 0;
    intptr_t distance = registers[REGISTERS[stride]] << scale;
    for (int row = 0; row < ROWS; row++) {
        char *memory = (char *)address + row * distance;
        if (prefix == PF2 || prefix == P66) /* tileloadd, tileloaddt1 */
            memcpy(tiles[reg][row], memory, sizeof tiles[reg][row]);
        else if (prefix == PF3)
            memcpy(memory, tiles[reg][row], sizeof tiles[reg][row]);
        else
            return 0;
    }
    return length;
}

static void on_illegal(int number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned long count = 0;
    int length;
    /* The next ones at once, too: entering the handler is what takes the time. */
    while ((length = execute((const uint8_t *)registers[REG_RIP], registers))) {
        registers[REG_RIP] += length;
        count++;
    }
    if (count == 0) { /* somebody else's: let the instruction end the process */
        signal(SIGILL, SIG_DFL);
        return;
    }
    __atomic_add_fetch(&executed, count, __ATOMIC_RELAXED);
}

__attribute__((destructor)) static void tell(void)
{
    if (executed)
        fprintf(stderr, "amx_emulator: executed %lu instructions\n", executed);
}

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

typedef int (*sigaction_type)(int, const struct sigaction *, struct sigaction *);

int sigaction(int number, const struct sigaction *action, struct sigaction *old)
{
    static sigaction_type original;
    if (!original)
        original = (sigaction_type)next("sigaction");
    int foreign = number == SIGILL && action && action->sa_handler != SIG_DFL &&
                  action->sa_sigaction != on_illegal;
    return original(number, foreign ? NULL : action, old);
}

long syscall(long number, ...)
{
    static long (*original)(long, ...);
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number == 158 && a[0] == 0x1023 && a[1] == 18) /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
        return refused ? -1 : 0;
    if (!original)
        original = (long (*)(long, ...))next("syscall");
    return original(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* /proc/cpuinfo with the features of AMX. */
static int open_cpuinfo(int file)
{
    FILE *from = fdopen(file, "r");
    int to = memfd_create("cpuinfo", MFD_CLOEXEC);
    char *line = NULL;
    size_t room = 0;
    ssize_t length;
    while ((length = getline(&line, &room, from)) > 0) {
        if (strncmp(line, "flags", 5) == 0) {
            line[length - 1] = 0;
            dprintf(to, "%s amx_tile amx_bf16 amx_int8\n", line);
        } else {
            dprintf(to, "%s", line);
        }
    }
    free(line);
    fclose(from);
    lseek(to, 0, SEEK_SET);
    return to;
}

static int open_like(const char *name, const char *path, int flags, int mode)
{
    int (*original)(const char *, int, ...) = (int (*)(const char *, int, ...))next(name);
    int file = original(path, flags, mode);
    return file >= 0 && strcmp(path, "/proc/cpuinfo") == 0 ? open_cpuinfo(file) : file;
}

#define OPEN(name)                                             \
    int name(const char *path, int flags, ...)                 \
    {                                                          \
        va_list list;                                          \
        va_start(list, flags);                                 \
        int mode = va_arg(list, int);                          \
        va_end(list);                                          \
        return open_like(#name, path, flags, mode);            \
    }
OPEN(open)
OPEN(open64)

__attribute__((constructor)) static void install(void)
{
    const char *mode = getenv("AMX_EMULATOR");
    wrong = mode && strcmp(mode, "wrong") == 0;
    refused = mode && strcmp(mode, "refuse") == 0;
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK};
    action.sa_sigaction = on_illegal;
    sigaction(SIGILL, &action, NULL);
}
