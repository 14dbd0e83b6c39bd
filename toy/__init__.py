from toy.build import *
