// The kernels of one instruction set, from all files that are compiled once for each.
#include "kernels.h"
#include "vec.h"

namespace ISA {

void pointwise(tiercel::Kernels&);
void linears(tiercel::Kernels&);
void panels(tiercel::Kernels&);
void packing(tiercel::Kernels&);
void attention(tiercel::Kernels&);
void conv(tiercel::Kernels&);
void ssd(tiercel::Kernels&);
void scan(tiercel::Kernels&);
void training(tiercel::Kernels&);

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

const tiercel::Kernels& table() {
    static const tiercel::Kernels k = [] {
        tiercel::Kernels k{};
        k.name = TEXT(ISA);
        pointwise(k);
        linears(k);
        panels(k);
        packing(k);
        attention(k);
        conv(k);
        ssd(k);
        scan(k);
        training(k);
        return k;
    }();
    return k;
}

}  // namespace ISA
