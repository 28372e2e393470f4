/* Memory that ends, and begins, at pages that may not be touched. The only file of these tests that knows Windows. */
#ifndef QINS_TEST_PAGES_H
#define QINS_TEST_PAGES_H

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(_WIN32)
#include <windows.h>
static inline size_t page_size(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}
static inline char *map_pages(size_t bytes)
{
    return VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}
static inline int forbid_page(char *p, size_t bytes)
{
    DWORD before;
    return VirtualProtect(p, bytes, PAGE_NOACCESS, &before) != 0;
}
static inline void unmap_pages(char *p, size_t bytes)
{
    (void)bytes;
    VirtualFree(p, 0, MEM_RELEASE);
}
#else
#include <sys/mman.h>
#include <unistd.h>
static inline size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }
static inline char *map_pages(size_t bytes)
{
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}
static inline int forbid_page(char *p, size_t bytes) { return mprotect(p, bytes, PROT_NONE) == 0; }
static inline void unmap_pages(char *p, size_t bytes) { munmap(p, bytes); }
#endif

/* Room for `bytes`, rounded up to *room, between two forbidden pages; exits if there is none. */
static inline char *between_pages(size_t bytes, size_t *room)
{
    const size_t page = page_size();
    *room = (bytes + page - 1) / page * page;
    char *p = map_pages(*room + 2 * page);
    if (p == NULL || !forbid_page(p, page) || !forbid_page(p + page + *room, page)) {
        fprintf(stderr, "no memory for guarded pages\n");
        exit(2);
    }
    return p + page;
}

static inline void give_back_pages(char *p, size_t room) { unmap_pages(p - page_size(), room + 2 * page_size()); }

#endif
